"""`python -m dataset_stats --recipe R --run RUN`: count the nouns of caption sets and report on them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_stats.config import few_captions, fields_of_today
from dataset_stats.job import StatsJob, read_job
from dataset_stats.tagging.taggers import TaggerSource, how_to_install
from pipelines.columns.choice_counts import describe_counts
from pipelines.columns.choices import require_some
from pipelines.command import parse_command, run_command
from pipelines.engine.preflight import require_packages
from pipelines.engine.progress import get_logger
from pipelines.engine.rejects import NOT_CHOSEN
from pipelines.engine.run import EngineConfig, run_over_shards
from pipelines.store.files import atomic_write_bytes, exclusive, fsync_directory, sha256_file
from pipelines.store.manifest import (
    MANIFEST_NAME,
    Fingerprint,
    Manifest,
    ShardDirectory,
    ShardReport,
    read_manifest,
)
from pipelines.store.summary import update_summary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dataset_stats.choosing import ChosenRows
    from dataset_stats.measures import SetMeasures
    from dataset_stats.noun_table import NounTable
    from dataset_stats.report.definitions import Definition
    from dataset_stats.set_rows import SetRows

OUTPUTS = ("report.html", "table1.md", "nouns.parquet", "nouns.csv")
log = get_logger("dataset_stats")


def main() -> None:
    """Count, merge, report; does nothing when all of it is done."""
    command = parse_command("dataset_stats", "Noun statistics of caption sets (paper, Table 1), with a report.")
    start_seconds = time.monotonic()
    job = read_job(command)
    require_packages("nltk", "numba", "textblob", "pandas", "jinja2", "plotly")
    if command.is_plan:
        _show_plan(job)
        return
    command.remember()
    if _is_done(job):
        log.info(f"nothing to do: {job.folder} is up to date ({job.tagger.title})")
        return
    # Before anything is counted: a choice may keep nothing.
    chosen = {name: found.evaluate(job.sources[name]) for name, found in job.choices.items()}
    _say_tagger(job.tagger)
    # Held while counting too: another run with another tagger would replace the counts of which this one reports.
    with exclusive(job.folder):
        counts = _count(job)
        _clear(job.folder)
        _report(job, counts, chosen)
    update_summary(command.run, f"seconds.{job.summary_key}", round(time.monotonic() - start_seconds, 1))


def _show_plan(job: StatsJob) -> None:
    for name, sources in job.sources.items():
        num_captions = sum(source.num_samples for source in sources)
        drawn = f" drawn of {job.set_sizes[name]:,}" if job.is_sample else ""
        log.info(f"{name}: {len(sources):,} shards, {num_captions:,} samples{drawn}")
        if name in job.choices:
            found = job.choices[name]
            counts = require_some(found.choice.count(found.shards).values(), found.choice)
            for line in describe_counts(counts):
                log.info(f"  {line}")
    log.info(f"tagger: {job.tagger.title}")


def _say_tagger(tagger: TaggerSource) -> None:
    if tagger.name == "nltk":
        log.info(f"tagger: {tagger.title}")
    else:
        log.info(f"tagger: {tagger.title}; for NLTK's averaged perceptron install its data with: {how_to_install()}")


def _is_done(job: StatsJob) -> bool:
    if not all((job.folder / name).is_file() for name in (MANIFEST_NAME, *OUTPUTS)):
        return False
    found = read_manifest(job.folder).fingerprint.fields
    return found | {"config": fields_of_today(found.get("config", {}))} == job.report_fingerprint.fields


def _count(job: StatsJob) -> Manifest:
    from dataset_stats.worker import CountConfig, NounCountWorker

    return run_over_shards(
        NounCountWorker,
        CountConfig(
            tagger=job.tagger,
            text_tokenizer=job.text_tokenizer,
            text_limits=tuple(job.config.text_limits),
            boilerplate=tuple(job.config.boilerplate),
            max_characters=job.config.max_characters,
            opening=job.opening,
            keeps_nouns=job.is_sample,
        ),
        sources=job.all_sources,
        output=ShardDirectory(job.folder / "counts"),
        fingerprint=job.count_fingerprint,
        # Counting needs no GPU, whatever the recipe reserves for captioning and features.
        engine=job.command.recipe.table("engine", EngineConfig).model_copy(update={"gpus_per_worker": 0.0}),
        max_reject_fraction=job.config.max_reject_fraction,
        room="dataset_stats",
        few_samples=few_captions([source.path for source in job.all_sources]),
        memory_settings={"dataset_stats.max_characters": job.config.max_characters},
    )


def _clear(folder: Path) -> None:
    """Remove what killed runs left half-written, and the manifest: it would vouch for files that are now replaced."""
    directory = ShardDirectory(folder)
    directory.clear_leftovers(is_held=True)
    directory.clear_manifest()
    # No power cut may bring the manifest back after the files have been replaced.
    fsync_directory(folder)


def _rows_of_sets(job: StatsJob, chosen: Mapping[str, ChosenRows]) -> dict[str, SetRows]:
    """The rows of each set among those that were counted."""
    from dataset_stats.set_rows import SetRows
    from dataset_stats.worker import CAPTIONS

    directory = ShardDirectory(job.folder / "counts")
    rows = {}
    for name, sources in job.sources.items():
        files = [directory.file(source.name, CAPTIONS) for source in sources]
        if name in chosen:
            chosen[name].require_same_samples(files)
        rows[name] = SetRows(files=files, chosen=chosen.get(name))
    return rows


def _report(job: StatsJob, counts: Manifest, chosen: Mapping[str, ChosenRows]) -> None:
    from dataset_stats.measures import as_json, measure_set, require_captions
    from dataset_stats.report.definitions import definitions
    from dataset_stats.report.table1 import table1

    config, rows = job.config, _rows_of_sets(job, chosen)
    measures = {name: measure_set(own, limits=config.text_limits) for name, own in rows.items()}
    for name, found in chosen.items():
        measures[name].before, measures[name].choice = found.set_choice.before, found.counts
    require_captions(measures)
    for name, measure in measures.items():
        measure.image_duplicates = job.scores.image_duplicates(name, rows[name])
        measure.claims = job.scores.claims(name, rows[name])
    noun_table = _merge(job, measures, rows)
    _name_marked_nouns(job, measures, rows)
    meanings = definitions(
        measures,
        valid_threshold=config.valid_threshold,
        limits=config.text_limits,
        boilerplate=config.boilerplate,
    )
    text = table1(measures, tagger=job.tagger.title, definition_list=meanings)
    atomic_write_bytes(job.folder / "table1.md", text.encode())
    _write_report(job, measures, rows=rows, noun_table=noun_table, meanings=meanings)
    summary = {name: measure.summary() for name, measure in measures.items()}
    _finish(job, summary, extra=as_json(measures), counts=counts)
    for name, m in measures.items():
        drawn = f" (a sample of {_set_size(job, m, name):,})" if job.is_sample else ""
        log.info(f"{name}: {m.headline()}{drawn}{m.left_out()}")
    log.info(f"report: {job.folder / OUTPUTS[0]}")


def _merge(job: StatsJob, measures: dict[str, SetMeasures], rows: Mapping[str, SetRows]) -> NounTable:
    """Add up the shards' nouns; fills in what `measures` still lack: DN and VN, and the errors of a sample."""
    from dataset_stats.estimate import estimate_set
    from dataset_stats.merge import clear_scratch, merge_counts
    from dataset_stats.noun_table import write_noun_table
    from dataset_stats.tagging.plurals import PluralFolder

    config = job.config
    singular = PluralFolder() if config.fold_plurals else None
    scratch = job.folder / ".merge"
    merged = scratch / "nouns.parquet"
    clear_scratch(scratch)
    merge_counts(_noun_files(job, rows, scratch), merged, scratch=scratch)
    noun_table = write_noun_table(
        merged,
        job.folder,
        measures=measures,
        valid_threshold=config.valid_threshold,
        num_top=config.num_table_nouns,
        singular=singular,
    )
    clear_scratch(scratch)
    if job.is_sample:
        for name, measure in measures.items():
            measure.estimate = estimate_set(
                rows[name],
                num_samples=_set_size(job, measure, name),
                seed=config.seed,
                valid_threshold=config.valid_threshold,
                singular=singular,
            )
    return noun_table


def _name_marked_nouns(job: StatsJob, measures: dict[str, SetMeasures], rows: Mapping[str, SetRows]) -> None:
    """Fill in which nouns unsupported sentences have more often than others, once all nouns are added up."""
    if not any(measure.claims and measure.claims.num_marked for measure in measures.values()):
        return
    from dataset_stats.counting import NounCounter
    from dataset_stats.marked_nouns import count_marked, more_often
    from dataset_stats.tagging.taggers import load_tagger

    counter = NounCounter(load_tagger(job.tagger))
    for name, measure in measures.items():
        if measure.claims and measure.claims.num_marked:
            marked = job.scores.marked_sentences(name, rows[name])
            nouns = count_marked(marked, counter, num_shards=len(job.sources[name]), opening=job.opening)
            measure.claims.marked_nouns = more_often(
                nouns, job.folder / "nouns.parquet", name, total_nouns=measure.total_nouns
            )


def _noun_files(job: StatsJob, rows: Mapping[str, SetRows], scratch: Path) -> dict[str, list[Path]]:
    """The counts of nouns of each set's shards; of rows that are chosen they are counted here."""
    from dataset_stats.merge import chosen_file
    from dataset_stats.worker import NOUNS

    directory, found = ShardDirectory(job.folder / "counts"), {}
    for position, (name, sources) in enumerate(job.sources.items()):
        if rows[name].chosen is None:
            found[name] = [directory.file(source.name, NOUNS) for source in sources]
            continue
        found[name] = [chosen_file(scratch, position, shard) for shard in range(len(sources))]
        for shard, path in enumerate(found[name]):
            rows[name].write_nouns(shard, path)
    return found


def _set_size(job: StatsJob, measure: SetMeasures, name: str) -> int:
    """The samples of a whole set: of one with a `where`, those that it keeps."""
    return job.set_sizes[name] if measure.choice is None else measure.choice.num_chosen


def _write_report(
    job: StatsJob,
    measures: dict[str, SetMeasures],
    *,
    rows: Mapping[str, SetRows],
    noun_table: NounTable,
    meanings: list[Definition],
) -> None:
    from dataset_stats.report.examples import quote_captions
    from dataset_stats.report.gallery import sample_gallery
    from dataset_stats.report.page import ReportData, write_report

    # What a choice keeps has the texts that it had before.
    shown = {name: sources for name, sources in job.sources.items() if name not in job.choices}
    gallery = sample_gallery(
        shown,
        job.raw_shards,
        opening=job.opening,
        num_images=job.config.num_gallery_images,
        seed=job.config.seed,
        max_pixels=job.max_pixels,
    )
    write_report(
        job.folder / "report.html",
        ReportData(
            run_name=job.command.run.absolute().name,
            tagger=job.tagger.title,
            tagger_hint="" if job.tagger.name == "nltk" else f"For NLTK's averaged perceptron: {how_to_install()}.",
            measures=measures,
            definitions=meanings,
            noun_table=noun_table,
            quotes=quote_captions(noun_table.top, measures, sources=job.sources, rows=rows, opening=job.opening),
            gallery=gallery,
            valid_threshold=job.config.valid_threshold,
            limits=job.config.text_limits,
            missing=job.scores.missing(),
        ),
    )


def _finish(job: StatsJob, summary: dict[str, Any], *, extra: dict[str, Any], counts: Manifest) -> None:
    directory, fingerprint = ShardDirectory(job.folder), job.report_fingerprint
    for name, sources in job.sources.items():
        rejected, num_kept = summary[name]["rejected"], summary[name]["num_captions"]
        num_read = sum(counts.shards[source.name].num_read for source in sources)
        num_left_out = num_read - num_kept - sum(rejected.values()) if name in job.choices else 0
        set_report = ShardReport(
            name=name,
            source=Fingerprint.of({"sources": [source.identity for source in sources]}).digest,
            num_read=num_read,
            num_kept=num_kept,
            rejected=rejected | ({NOT_CHOSEN: num_left_out} if num_left_out else {}),
        )
        directory.write_marker(set_report, fingerprint)
    update_summary(job.command.run, job.summary_key, summary)
    upstream = {"counts": counts.fingerprint.digest}
    extra = {
        "sets": extra,
        "tagger": job.tagger.title,
        "valid_threshold": job.config.valid_threshold,
        "sample": {"size": job.config.sample, "seed": job.config.seed} if job.is_sample else None,
        "files": {name: sha256_file(job.folder / name) for name in OUTPUTS},
    }
    directory.write_manifest(fingerprint, list(job.sources), upstream=upstream, extra=extra)


if __name__ == "__main__":
    sys.exit(run_command("dataset_stats", main))

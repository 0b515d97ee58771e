"""`python -m dataset_stats --recipe R --run RUN`: count the nouns of caption sets and report on them."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_stats.captions import caption_sources
from dataset_stats.config import DatasetStatsConfig
from dataset_stats.tagging.taggers import HOW_TO_INSTALL, TaggerSource, find_tagger
from pipelines.command import Command, parse_command, run_command
from pipelines.engine import EngineConfig, run_over_shards
from pipelines.manifest import Fingerprint, Manifest, ShardReport, StageDirectory, read_manifest
from pipelines.pieces import Source
from pipelines.progress import get_logger
from pipelines.recipe import DataConfig
from pipelines.shards import expand_shards
from pipelines.storage import atomic_write_bytes, sha256_file
from pipelines.summary import update_summary

if TYPE_CHECKING:
    from dataset_stats.measures import Definition, SetMeasures
    from dataset_stats.noun_table import Vocabulary

COUNT_VERSION = 1  # raise when counting gives other numbers
REPORT_VERSION = 1  # raise when the report shows other things
OUTPUTS = ("report.html", "table1.md", "nouns.parquet", "nouns.csv")
log = get_logger("dataset_stats")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the stage: what it reads, with which tagger, and where it writes."""

    command: Command
    config: DatasetStatsConfig
    tagger: TaggerSource
    text_tokenizer: str
    sources: dict[str, list[Source]]  # by set
    raw_shards: list[str]  # for the gallery's images; empty where there are none
    max_pixels: int

    @property
    def folder(self) -> Path:
        """RUN/stats."""
        return self.command.run / "stats"

    @property
    def all_sources(self) -> list[Source]:
        """Sources of all sets, each once."""
        by_name = {source.name: source for sources in self.sources.values() for source in sources}
        return [by_name[name] for name in sorted(by_name)]

    @property
    def count_fingerprint(self) -> Fingerprint:
        """What decides the counts of a shard; adding sets or shards leaves it as it is."""
        return Fingerprint.of(
            {
                "stage": "dataset_stats.counts",
                "version": COUNT_VERSION,
                "tagger": self.tagger.identity,
                "tokenizer": f"nltk@{version('nltk')}",
                "text_tokenizer": sha256_file(Path(self.text_tokenizer)) if self.text_tokenizer else None,
                "text_limits": self.config.text_limits,
                "boilerplate": self.config.boilerplate,
                "max_characters": self.config.max_characters,
            }
        )

    @property
    def report_fingerprint(self) -> Fingerprint:
        """What decides the numbers and the report."""
        return Fingerprint.of(
            {
                "stage": "dataset_stats",
                "version": REPORT_VERSION,
                "counts": self.count_fingerprint.digest,
                "config": self.config.model_dump(mode="json"),
                "sources": {
                    name: [f"{source.name}:{source.identity}" for source in sources]
                    for name, sources in self.sources.items()
                },
            }
        )


def main() -> None:
    """Count, merge, report; does nothing when all of it is done."""
    command = parse_command("dataset_stats", "Noun statistics of caption sets (paper, Table 1), with a report.")
    start_seconds = time.monotonic()
    job = _plan(command)
    if command.is_plan:
        _show_plan(job)
        return
    if _is_done(job):
        log.info(f"nothing to do: {job.folder} is up to date ({job.tagger.title})")
        return
    _say_tagger(job.tagger)
    counts = _count(job)
    _report(job, counts)
    update_summary(command.run, "seconds.dataset_stats", round(time.monotonic() - start_seconds, 1))


def _plan(command: Command) -> Job:
    config = command.recipe.table("dataset_stats", DatasetStatsConfig)
    layouts = {caption_set.layout for caption_set in config.sets.values()}
    captions_folder = command.run / "captions"
    captions = read_manifest(captions_folder) if "captions" in layouts else None
    data = command.recipe.table("data", DataConfig)
    raw_shards = _raw_shards(command, data, is_needed="raw" in layouts)
    sources = {
        name: caption_sources(
            name, caption_set, captions=captions, captions_folder=captions_folder, raw_shards=raw_shards
        )
        for name, caption_set in config.sets.items()
    }
    return Job(
        command=command,
        config=config,
        tagger=find_tagger(config.tagger),
        text_tokenizer=_find_text_tokenizer(command, config),
        sources=sources,
        raw_shards=raw_shards,
        max_pixels=data.max_pixels,
    )


def _raw_shards(command: Command, data: DataConfig, *, is_needed: bool) -> list[str]:
    patterns = [data.shards] if isinstance(data.shards, str) else data.shards
    try:
        return expand_shards([pattern.replace("{run}", str(command.run)) for pattern in patterns])
    except FileNotFoundError as error:
        if is_needed:
            raise
        log.info(f"the gallery will have no images: {error}")
        return []


def _find_text_tokenizer(command: Command, config: DatasetStatsConfig) -> str:
    features = command.recipe.tables.get("features", {})
    model_id = config.text_model or features.get("text_model", "")
    revision = config.text_revision if config.text_model else features.get("text_revision")
    if not model_id:
        return ""
    from dataset_stats.text_tokenizer import find_text_tokenizer

    return find_text_tokenizer(model_id, revision)


def _show_plan(job: Job) -> None:
    for name, sources in job.sources.items():
        num_captions = sum(source.num_samples for source in sources)
        log.info(f"{name}: {len(sources):,} shards, {num_captions:,} samples")
    log.info(f"tagger: {job.tagger.title}")


def _say_tagger(tagger: TaggerSource) -> None:
    if tagger.name == "nltk":
        log.info(f"tagger: {tagger.title}")
    else:
        log.info(f"tagger: {tagger.title}; for NLTK's averaged perceptron install its data with: {HOW_TO_INSTALL}")


def _is_done(job: Job) -> bool:
    if not all((job.folder / name).is_file() for name in ("manifest.json", *OUTPUTS)):
        return False
    return read_manifest(job.folder).fingerprint.digest == job.report_fingerprint.digest


def _count(job: Job) -> Manifest:
    from dataset_stats.worker import CountConfig, NounCountWorker

    return run_over_shards(
        NounCountWorker,
        CountConfig(
            tagger=job.tagger,
            text_tokenizer=job.text_tokenizer,
            text_limits=tuple(job.config.text_limits),
            boilerplate=tuple(job.config.boilerplate),
            max_characters=job.config.max_characters,
        ),
        sources=job.all_sources,
        output=StageDirectory(job.folder / "counts"),
        fingerprint=job.count_fingerprint,
        engine=job.command.recipe.table("engine", EngineConfig),
        max_reject_fraction=job.config.max_reject_fraction,
        room="dataset_stats",
    )


def _report(job: Job, counts: Manifest) -> None:
    from dataset_stats.measures import as_json, definitions, measure_set, table1
    from dataset_stats.merge import merge_counts
    from dataset_stats.noun_table import write_vocabulary
    from dataset_stats.worker import CAPTIONS, NOUNS

    config, directory = job.config, StageDirectory(job.folder / "counts")
    names = {name: [source.name for source in sources] for name, sources in job.sources.items()}
    measures = {
        name: measure_set(
            [counts.shards[shard] for shard in shards],
            [directory.file(shard, CAPTIONS) for shard in shards],
            limits=config.text_limits,
        )
        for name, shards in names.items()
    }
    scratch = job.folder / ".merge"
    merged = scratch / "nouns.parquet"
    noun_files = {name: [directory.file(shard, NOUNS) for shard in shards] for name, shards in names.items()}
    merge_counts(noun_files, merged, scratch=scratch)
    vocabulary = write_vocabulary(
        merged,
        job.folder,
        measures=measures,
        valid_threshold=config.valid_threshold,
        num_top=config.num_table_nouns,
    )
    shutil.rmtree(scratch)
    meanings = definitions(
        valid_threshold=config.valid_threshold, limits=config.text_limits, boilerplate=config.boilerplate
    )
    text = table1(measures, tagger=job.tagger.title, definition_list=meanings)
    atomic_write_bytes(job.folder / "table1.md", text.encode())
    _write_report(job, measures, vocabulary, meanings)
    summary = {name: measure.summary() for name, measure in measures.items()}
    _finish(job, summary, extra=as_json(measures), counts=counts)
    for name, m in measures.items():
        ratio = f"{m.valid_distinct_nouns:,}/{m.distinct_nouns:,} = {m.valid_fraction:.1%}"
        log.info(f"{name}: VN/DN {ratio}, {m.nouns_per_image:.1f} nouns per image, {m.num_captions:,} captions")
    log.info(f"report: {job.folder / OUTPUTS[0]}")


def _write_report(
    job: Job, measures: dict[str, SetMeasures], vocabulary: Vocabulary, meanings: list[Definition]
) -> None:
    from dataset_stats.gallery import example_captions, sample_gallery
    from dataset_stats.report import ReportData, write_report

    gallery = sample_gallery(
        job.sources,
        job.raw_shards,
        num_images=job.config.num_gallery_images,
        seed=job.config.seed,
        max_pixels=job.max_pixels,
    )
    hint = "" if job.tagger.name == "nltk" else f"For NLTK's averaged perceptron: {HOW_TO_INSTALL}."
    write_report(
        job.folder / "report.html",
        ReportData(
            run_name=job.command.run.absolute().name,
            tagger=job.tagger.title,
            tagger_hint=hint,
            measures=measures,
            definitions=meanings,
            vocabulary=vocabulary,
            examples=example_captions(vocabulary.top, job.sources),
            gallery=gallery,
            valid_threshold=job.config.valid_threshold,
            limits=job.config.text_limits,
        ),
    )


def _finish(job: Job, summary: dict[str, Any], *, extra: dict[str, Any], counts: Manifest) -> None:
    directory = StageDirectory(job.folder)
    fingerprint = job.report_fingerprint
    for name, sources in job.sources.items():
        reports = [counts.shards[source.name] for source in sources]
        set_report = ShardReport(
            name=name,
            source=Fingerprint.of({"sources": [source.identity for source in sources]}).digest,
            num_read=sum(report.num_read for report in reports),
            num_kept=sum(report.num_kept for report in reports),
            rejected=summary[name]["rejected"],
        )
        directory.write_marker(set_report, fingerprint)
    update_summary(job.command.run, "dataset_stats", summary)
    upstream = {"counts": counts.fingerprint.digest}
    extra = {"sets": extra, "tagger": job.tagger.title, "valid_threshold": job.config.valid_threshold}
    directory.write_manifest(fingerprint, list(job.sources), upstream=upstream, extra=extra)


if __name__ == "__main__":
    sys.exit(run_command("dataset_stats", main))

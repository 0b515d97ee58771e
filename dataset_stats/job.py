"""One `make stats`: which captions it counts, with which tagger and tokenizer, and what decides its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dataset_stats.captions import PIPELINE_COLUMN, Address, RawOpening
from dataset_stats.choosing import SetChoice, SetChoices
from dataset_stats.config import DECIDES_REPORT, CaptionSet, DatasetStatsConfig
from dataset_stats.scores import Scores
from dataset_stats.sources import RunFiles, caption_sources, sample_sources
from dataset_stats.tagging.taggers import TaggerSource, find_tagger
from encoders.token_kinds import spells_bytes
from encoders.tokens import fetch_tokenizer
from encoders.weights import resolve_model
from errors import MissingFileError, UserError
from pipelines.columns.caption_columns import captions_folder
from pipelines.command import Command
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.raw.shard_names import shard_name
from pipelines.recipe import DataConfig
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory, read_manifest

COUNT_VERSION = 4  # raise when counting gives other numbers
BYTES_VERSION = 2  # the same where the T5 vocabulary spells what it lacks in bytes
REPORT_VERSION = 7  # raise when the report shows other things
# What the fingerprint of counts had before defaults were left out of it. Keys that came later have no place here.
WRITTEN_OUT = ("text_limits", "boilerplate", "max_characters")
ALT_TEXT = "alt_text"
log = get_logger("dataset_stats")


@dataclass(frozen=True, kw_only=True)
class StatsJob:
    """One `make stats`: what it reads, with which tagger, and where it writes.

    Attributes:
        sources: by set; cut down to the sample where there is one.
        set_sizes: samples in each whole set.
        raw_shards: for the gallery's images; empty where there are none.
        opening: of those, and of sets of raw shards.
        choices: of sets with a `where`, by name.
        count_fingerprint: what decides the counts of a shard; adding sets or shards leaves it as it is.
    """

    command: Command
    config: DatasetStatsConfig
    tagger: TaggerSource
    text_tokenizer: str
    sources: dict[str, list[Source]]
    set_sizes: dict[str, int]
    choices: dict[str, SetChoice]
    raw_shards: list[str]
    opening: RawOpening
    max_pixels: int
    folder: Path
    count_fingerprint: Fingerprint

    @property
    def is_sample(self) -> bool:
        """Whether this is an estimate from a sample."""
        return self.config.sample > 0

    @property
    def summary_key(self) -> str:
        """Where the numbers go in summary.json."""
        return "dataset_stats_sample" if self.is_sample else "dataset_stats"

    @property
    def all_sources(self) -> list[Source]:
        """Sources of all sets, each once."""
        by_name = {source.name: source for sources in self.sources.values() for source in sources}
        return [by_name[name] for name in sorted(by_name)]

    @cached_property
    def scores(self) -> Scores:
        """What columns say of the sets' samples."""
        return Scores(self.command.run, self.sources)

    @property
    def report_fingerprint(self) -> Fingerprint:
        """What decides the numbers and the report."""
        choices = {
            name: {"where": found.choice.settings.where, "columns": found.hashes()}
            for name, found in self.choices.items()
        }
        return Fingerprint.of(
            {
                "stage": "dataset_stats",
                "version": REPORT_VERSION,
                "counts": self.count_fingerprint.digest,
                "config": self.config.fingerprint_fields(DECIDES_REPORT),
                "set_sizes": self.set_sizes,
                "sources": {
                    name: [f"{source.name}:{source.identity}" for source in sources]
                    for name, sources in self.sources.items()
                },
                "gallery": self._gallery_inputs,
                **({"choices": choices} if choices else {}),
                **({"scores": scores} if (scores := self.scores.hashes()) else {}),
            }
        )

    @property
    def _gallery_inputs(self) -> dict[str, Any] | None:
        """What decides the gallery's images, besides the captions; None where there is no gallery."""
        if not self.config.num_gallery_images:
            return None
        addresses = [Address.parse(source.path) for source in self.all_sources]
        captioned = {address.shard for address in addresses if address.layout == "captions"}
        raw_shards = sorted(captioned & {shard_name(path) for path in self.raw_shards})
        return {"raw_shards": raw_shards, "max_pixels": self.max_pixels}


def read_job(command: Command) -> StatsJob:
    """Return what a command is to do.

    Raises:
        UserError: the recipe is wrong, or what it names is not there; names it.
    """
    config = command.recipe.table("dataset_stats", DatasetStatsConfig)
    set_choices = SetChoices(command.run, config.sets)
    needs_captions = any(caption_set.reads_captions for caption_set in config.sets.values())
    captions = read_manifest(captions_folder(command.run)) if needs_captions else None
    data = command.recipe.table("data", DataConfig)
    raw_shards = _raw_shards(
        command, is_needed=any(caption_set.layout == "raw" for caption_set in config.sets.values())
    )
    opening = RawOpening(reading=data.reading, run=command.run)
    inputs = RunFiles(run=command.run, captions=captions, raw_shards=raw_shards, opening=opening)
    sets = _sets_to_count(config, captions)
    whole = {name: caption_sources(name, caption_set, inputs=inputs) for name, caption_set in sets.items()}
    whole = set_choices.with_befores(whole)
    choices = set_choices.of_sources(whole)
    sources = whole if config.sample else set_choices.keeping_nouns(whole)
    if config.sample:
        sources = {name: sample_sources(found, config.sample, seed=config.seed) for name, found in whole.items()}
    # An estimate keeps to a folder and a key of its own, so that it never passes for a full count.
    folder = command.run / ("stats-sample" if config.sample else "stats")
    tagger, text_tokenizer = find_tagger(config.tagger), _find_text_tokenizer(command, config)
    return StatsJob(
        command=command,
        config=config,
        tagger=tagger,
        text_tokenizer=text_tokenizer,
        sources=sources,
        set_sizes={name: sum(source.num_samples for source in found) for name, found in whole.items()},
        choices=choices,
        raw_shards=raw_shards,
        opening=opening,
        max_pixels=data.max_pixels,
        folder=folder,
        count_fingerprint=_count_fingerprint(config, folder / "counts", tagger=tagger, text_tokenizer=text_tokenizer),
    )


def _sets_to_count(config: DatasetStatsConfig, captions: Manifest | None) -> dict[str, CaptionSet]:
    """Return the sets of the recipe; of those that are there by default one alone, where both have the same texts."""
    texts = {} if captions is None else captions.extra.get("texts_of", {})
    if "sets" in config.model_fields_set or not texts or texts.get(ALT_TEXT) != texts.get(PIPELINE_COLUMN):
        return config.sets
    log.info("the captions are the images' own texts, as they came: one set of them is counted, not two alike")
    return {name: found for name, found in config.sets.items() if found.column == PIPELINE_COLUMN}


def _count_fingerprint(
    config: DatasetStatsConfig, counts: Path, *, tagger: TaggerSource, text_tokenizer: str
) -> Fingerprint:
    fingerprint = Fingerprint.of(
        {
            "stage": "dataset_stats.counts",
            "version": COUNT_VERSION,
            "tagger": tagger.identity,
            "tokenizer": f"nltk@{version('nltk')}",
            "text_tokenizer": sha256_file(Path(text_tokenizer)) if text_tokenizer else None,
            "keeps_nouns": config.sample > 0,
            **({"bytes_version": BYTES_VERSION} if text_tokenizer and spells_bytes(Path(text_tokenizer)) else {}),
            **config.fingerprint_fields(),
        }
    )
    defaults = config.fingerprint_defaults()
    return ShardDirectory(counts).known_as(fingerprint, defaults={name: defaults[name] for name in WRITTEN_OUT})


def _raw_shards(command: Command, *, is_needed: bool) -> list[str]:
    try:
        return command.raw_shards
    except MissingFileError as error:
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
    source = resolve_model(model_id, revision)
    try:
        return str(fetch_tokenizer(source, key="features.text_model"))
    except UserError as error:
        if Path(source.location).is_dir():
            raise
        log.warning(f"T5 lengths are not measured: {error}")
        return ""

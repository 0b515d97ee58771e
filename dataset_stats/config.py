"""`[dataset_stats]`: which caption sets to compare, and how nouns are found and shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from pipelines.recipe import Decides, TableConfig

DECIDES_REPORT = "decides the report, as the counts do"
Value = TypeVar("Value")
ForReport = Annotated[Value, DECIDES_REPORT]
MIN_SAMPLE = 100  # standard errors of fewer samples are themselves guesses
# So much takes a core ten to twenty seconds, in which Ray's workers would hardly have done more. It was measured at
# 60,000 captions of 30 tokens a second, so dense ones of 120 are 15,000; their T5 tokens and reading come on top.
FEW_CAPTIONS = 100_000
# What is read over a network waits for it, and several workers wait at the same time.
FEW_REMOTE_CAPTIONS = 2_000


def few_captions(paths: list[str]) -> int:
    """Return how many captions of the files or URLs `paths` are small work."""
    return FEW_REMOTE_CAPTIONS if any("://" in path for path in paths) else FEW_CAPTIONS


class CaptionSet(TableConfig):
    """One caption set: which files it is in and which column holds its text."""

    shards: list[str] = Field(
        default=["*"],
        min_length=1,
        description='Names (fnmatch patterns) of shards of RUN/captions ("captions") or of data.shards ("raw")',
    )
    files: str | list[str] = Field(
        default="",
        description="Files of the other layouts: brace ranges, globs, folders or fsspec URLs",
    )
    layout: Literal["auto", "captions", "raw", "parquet", "arrow", "csv", "tsv", "jsonl", "json", "lines", "text"] = (
        Field(
            default="auto",
            description="captions: this pipeline's Parquet; raw: alt texts of the raw shards; parquet, arrow, csv, "
            "tsv, jsonl, json: tables with a text column; lines: a caption a line; text: a file a caption, in folders "
            "or tars (SAM-LLaVA); auto: captions, or what the names of `files` say",
        )
    )
    column: str = Field(
        default="",
        description="Column that holds the text; empty: the first there is of caption, text, prompt and their like; "
        "of raw shards: the text that comes with the image; of RUN/captions also a pass of [captioning.passes]",
    )
    where: str | None = Field(
        default=None,
        description="Samples that are counted, by an expression over their columns as in [features.<table>]; left out: "
        "all. Of RUN/captions and raw shards by the run's columns, of Parquet files by their own",
    )

    @property
    def reads_captions(self) -> bool:
        """Whether the set is of RUN/captions."""
        return self.layout == "captions" or (self.layout == "auto" and not self.files)

    @property
    def has_samples(self) -> bool:
        """Whether the set is of samples of the run, of which there may be columns."""
        return self.reads_captions or self.layout == "raw"


class DatasetStatsConfig(TableConfig):
    """`[dataset_stats]`: noun statistics of any caption sets (paper, section 2.4 and Table 1)."""

    sets: ForReport[dict[str, CaptionSet]] = Field(
        default={"alt-text": CaptionSet(column="alt_text"), "caption": CaptionSet(column="caption")},
        min_length=1,
        description="Caption sets by name, in the order of the table; every name is a row of Table 1. On the command "
        "line also as text: 'laion=laion_*#alt_text,mine=data/*.parquet#TEXT'",
    )
    tagger: Literal["auto", "nltk", "textblob"] = Field(
        default="auto",
        description="auto: NLTK's averaged perceptron where its data is installed, else TextBlob's lexicon",
    )
    valid_threshold: ForReport[int] = Field(
        default=10, ge=0, description="A distinct noun is valid when it occurs more often than this (occurrences)"
    )
    fold_plurals: ForReport[bool] = Field(
        default=True,
        description="Show, as lines of their own, DN and VN with plurals counted as their singulars",
    )
    sample: ForReport[int] = Field(
        default=0,
        ge=0,
        description="Samples drawn from each set for an estimate with standard errors, in RUN/stats-sample; 0: all",
    )
    text_model: str = Field(
        default="",
        description="Folder or hub id whose T5 tokenizer measures lengths; empty: features.text_model of the recipe",
    )
    text_revision: str | None = Field(default=None, description="Revision of text_model on the hub")
    text_limits: Decides[list[int]] = Field(
        default=[120, 300], min_length=1, description="Lengths (T5 tokens, end token included) a caption is checked for"
    )
    boilerplate: Decides[list[str]] = Field(
        default=[
            f"{opening} {noun}"
            for noun in ("image", "picture", "photo", "photograph", "scene")
            for opening in ("the", "this", "in the", "in this")
        ],
        description="Openings (any case) that say nothing about the image",
    )
    max_characters: Decides[int] = Field(
        default=100_000, ge=1, description="Longest caption that is counted (characters); longer ones are rejected"
    )
    max_reject_fraction: float = Field(
        default=0.5, ge=0, le=1, description="Share of rejected captions at which the command fails"
    )
    num_table_nouns: ForReport[int] = Field(
        default=3000, ge=10, description="Nouns in the report's table, most frequent first; nouns.parquet has all"
    )
    num_gallery_images: ForReport[int] = Field(default=24, ge=0, description="Sampled images in the report's gallery")
    seed: ForReport[int] = Field(default=0, ge=0, description="Seed of the gallery and of `sample`")

    @field_validator("sets", mode="before")
    @classmethod
    def _read_text(cls, sets: Any) -> Any:
        # A comma before the next "name=" ends a set; other commas belong to brace lists.
        return dict(_parse_set(item) for item in re.split(r",(?=[^,{}]+=)", sets)) if isinstance(sets, str) else sets

    @field_validator("sets")
    @classmethod
    def _check_names(cls, sets: dict[str, CaptionSet]) -> dict[str, CaptionSet]:
        # Names become column names of nouns.parquet and keys of summary.json.
        for name in sets:
            is_taken = name in ("noun", "singular") or name.endswith(" example")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*( [A-Za-z0-9._+-]+)*", name) or is_taken:
                raise ValueError(
                    f"{name!r} cannot name a caption set: use letters, digits, . _ + - and single spaces between them"
                )
        return sets

    @field_validator("sample")
    @classmethod
    def _check_sample(cls, sample: int) -> int:
        if 0 < sample < MIN_SAMPLE:
            raise ValueError(f"{sample} samples are too few for an estimate; use at least {MIN_SAMPLE}, or 0 for all")
        return sample

    @field_validator("text_limits")
    @classmethod
    def _check_limits(cls, limits: list[int]) -> list[int]:
        if min(limits) < 2:
            raise ValueError("a limit below 2 tokens leaves no room for text")
        if len(set(limits)) < len(limits):
            raise ValueError(f"every limit is counted once, but {limits} names one twice")
        return limits


def fields_of_today(found: dict[str, Any]) -> dict[str, Any] | None:
    """Return what decided a report, read as a recipe: a key that there was not yet is at its default, in a set too.

    None if that is no recipe any more.
    """
    try:
        return DatasetStatsConfig.model_validate(found).fingerprint_fields(DECIDES_REPORT)
    except ValidationError:
        return None


def _parse_set(item: str) -> tuple[str, dict[str, Any]]:
    """Read `name=files#column`; what is no path and has neither a suffix nor a folder names shards of RUN/captions."""
    name, equals, rest = item.strip().partition("=")
    files, _, column = (rest, "", "") if Path(rest).exists() else rest.partition("#")
    if not equals or not files:
        raise ValueError(f"{item!r} is not of the form name=files#column")
    fields: dict[str, Any] = {"column": column} if column else {}
    if "/" not in files and not Path(files).suffix and not Path(files).exists():
        return name, {"layout": "captions", "shards": [files], **fields}
    return name, {"files": files, **fields}

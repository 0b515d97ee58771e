"""The recipe table `[columns]`."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, StringConstraints

from pipelines.recipe import TableConfig

ColumnName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class JoinedTableConfig(TableConfig):
    """A table whose columns are joined to samples by key."""

    files: str = Field(
        pattern=r"\S",
        description="Parquet, Arrow, CSV, TSV or JSON: files, files#key or files#key,column,… with a path, glob or URL",
    )


class HeadConfig(TableConfig):
    """A head over CLIP's embeddings."""

    file: str = Field(
        pattern=r"\S",
        description="Its weights, .pth or .safetensors: a file, or org/name/file of the hub, in its cache",
    )


class DuplicatesConfig(TableConfig):
    """`[columns.duplicates]`: which images are near duplicates of others."""

    radius: int = Field(
        default=4, ge=0, le=10, description="Bits of 64 that perceptual hashes of one picture differ in"
    )
    crops: bool = Field(default=True, description="Find what is cropped by up to 5% a side, too")
    mirror: bool = Field(default=False, description="Find what a mirror shows, too")
    embedding: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Cosine of CLIP's embeddings from which on two images are one, too; null = they are not compared",
    )
    representative: str = Field(
        default="megapixels + 1e-15 * file_bytes",
        pattern=r"\S",
        description="Expression over columns; of each group the sample with the largest value is no duplicate",
    )
    runs: Sequence[str] = Field(
        default=(), description="Folders of other runs: what they have, too, is a duplicate here"
    )


class ColumnsConfig(TableConfig):
    """`[columns]`: what is measured of each sample. Nothing is deleted by it: a column is there to be chosen by."""

    scores: Sequence[str] = Field(
        default=("pixels",), description="Scores to make beside heads and tables, see docs/CURATION.md"
    )
    tables: Mapping[ColumnName, JoinedTableConfig] = Field(
        default_factory=dict, description="Tables that are joined by key: each gives the score of its name"
    )
    caption_columns: Sequence[ColumnName] = Field(
        default=("caption", "alt_text"),
        description="Texts that scores of captions are made of: caption, alt_text, or the name of a captioning pass",
    )
    device: str = Field(default="auto", description="Where networks run: auto, cpu, cuda or cuda:N")
    clip_model: str = Field(
        default="openai/clip-vit-large-patch14",
        description="Hub id or local folder of the CLIP that clip, clip_score and the heads are made with",
    )
    clip_revision: str | None = Field(default=None, description="Commit of the hub repository; null = main")
    clip_batch_size: int = Field(default=32, gt=0, description="Images or texts that CLIP takes at once")
    heads: Mapping[ColumnName, HeadConfig] = Field(
        default_factory=dict,
        description="Small networks over CLIP's embeddings: each gives the score and the column of its name",
    )
    duplicates: DuplicatesConfig = Field(
        default_factory=DuplicatesConfig, description="How near duplicates are found, for the score duplicates"
    )
    max_reject_fraction: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of samples a score may have no columns for before the command fails",
    )

"""The recipe table `[columns]`."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, StringConstraints

from pipelines.recipe import TableConfig

TableName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class JoinedTableConfig(TableConfig):
    """A table whose columns are joined to samples by key."""

    files: str = Field(
        pattern=r"\S",
        description="Parquet, Arrow, CSV, TSV or JSON: files, files#key or files#key,column,… with a path, glob or URL",
    )


class ColumnsConfig(TableConfig):
    """`[columns]`: what is measured of each sample. Nothing is deleted by it: a column is there to be chosen by."""

    scores: Sequence[str] = Field(default=("pixels",), description="Scores to make, see docs/CURATION.md")
    tables: Mapping[TableName, JoinedTableConfig] = Field(
        default_factory=dict, description="Tables that are joined by key: each gives the score of its name"
    )
    max_reject_fraction: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of samples a score may have no columns for before the command fails",
    )

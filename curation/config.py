"""The recipe table `[columns]`."""

from collections.abc import Sequence

from pydantic import Field

from pipelines.recipe import TableConfig


class ColumnsConfig(TableConfig):
    """`[columns]`: what is measured of each sample. Nothing is deleted by it: a column is there to be chosen by."""

    scores: Sequence[str] = Field(default=("pixels",), description="Scores to make, see docs/CURATION.md")
    max_reject_fraction: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of samples a score may have no columns for before the command fails",
    )

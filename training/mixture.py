"""`[[training.<stage>.datasets]]`: what a stage reads, mixed by weight."""

from collections.abc import Sequence
from typing import Literal

import pydantic

from errors import UserError
from pipelines.recipe import TableConfig

# What a dataset's samples are to an objective: what is to be learnt, or what is not to be lost by it.
DatasetRole = Literal["instance", "prior"]


class DatasetConfig(TableConfig):
    """One entry of `[[training.<stage>.datasets]]`: shards that are mixed into the stage by weight."""

    run: str = pydantic.Field(
        default="{run}",
        min_length=1,
        description="Run whose features are read: a folder or an fsspec URL (s3://bucket/runs/x); {run} is this run",
    )
    features: str | None = pydantic.Field(
        default=None,
        description="Named table of [features] that says what is read of this run; null = that of the stage",
    )
    shards: list[str] | None = pydantic.Field(
        default=None, min_length=1, description="Shell patterns of shard names; null = the shards of the features table"
    )
    weight: float = pydantic.Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Share of the samples drawn, relative to the other datasets of the stage",
    )
    role: DatasetRole = pydantic.Field(
        default="instance",
        description="What it is to objective prior_preservation: instance (what is learnt) or prior (images that the "
        "model drew before, which it is to go on drawing)",
    )


def require_roles(datasets: Sequence[DatasetConfig], objective: str, *, key: str) -> None:
    """Refuse roles of datasets that the objective has no use for, or lacks.

    Raises:
        UserError: names `key`, and the role.
    """
    roles = [dataset.role for dataset in datasets]
    if objective != "prior_preservation":
        if "prior" in roles:
            raise UserError(
                f"{key}.datasets.{roles.index('prior')}.role = 'prior' is for objective prior_preservation, "
                f"but the stage's is {objective!r}"
            )
        return
    for role in ("instance", "prior"):
        if role not in roles:
            raise UserError(
                f"{key}.objective = 'prior_preservation' has no dataset with role = {role!r}: it learns those of role "
                "'instance', and keeps what it knows by those of role 'prior', images that the model drew before"
            )

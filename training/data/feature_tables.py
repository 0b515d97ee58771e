"""The named tables of `[features]`, as training reads them."""

from typing import Any

import pydantic

from encoders.text import DEFAULT_CLEANING
from errors import UserError
from pipelines.recipe import Recipe
from pipelines.store.families import PIXELS


class CaptionTable(pydantic.BaseModel):
    """An entry of `captions`: a column of the captions, and how often training draws it: a number or an expression."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    column: str
    text: str | None = None
    weight: float | str = 1.0


class FeatureTable(pydantic.BaseModel):
    """What training reads of a named table of `[features]`; the features room owns and validates the tables."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    shards: list[str] = ["*"]
    where: str | None = None
    weight: str | None = None
    weight_temperature: float | None = None
    resolution: int
    buckets: bool = False
    text: bool = True
    captions: list[CaptionTable] = [CaptionTable(column="caption")]
    text_storage: str = "bfloat16"
    text_variant: str | None = None
    image_variant: str | None = None
    vae_model: str = ""
    vae_revision: str | None = None
    text_model: str = ""
    text_revision: str | None = None
    text_cleaning: str = DEFAULT_CLEANING
    max_tokens: int | None = None
    families: dict[str, dict[str, Any]] = {}

    @property
    def has_pixels(self) -> bool:
        """Whether it is of crops of images alone, which a codec is trained on."""
        return PIXELS in self.families


def read_feature_table(recipe: Recipe, name: str) -> FeatureTable:
    """Return what the recipe says about the features `name`.

    Raises:
        UserError: the table or a key is missing or wrong; names it.
    """
    try:
        return FeatureTable.model_validate(recipe.laid_over("features", name, keys=FeatureTable.model_fields))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{recipe.path}: features.{name}.{key}: {first['msg']}") from None

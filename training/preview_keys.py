"""Keys of a stage that say what its average draws while it trains."""

import re
from typing import Annotated, Any

import pydantic

from pipelines.recipe import TableConfig

SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}", re.ASCII)
MAX_PREVIEWS = 64


class PreviewKeys(TableConfig):
    """Those of `[training.<stage>]` that are of previews."""

    preview_prompts: list[Annotated[str, pydantic.Field(min_length=1)]] = pydantic.Field(
        default=[],
        max_length=MAX_PREVIEWS,
        description="Prompts that a PixArt's average draws while it trains, always from the same noise; see previews/ "
        "in the stage's folder",
    )
    preview_controls: list[Annotated[str, pydantic.Field(min_length=1)]] = pydantic.Field(
        default=[],
        max_length=MAX_PREVIEWS,
        description="Of trains = 'control': control images (maps, as the branch is trained with) that lead "
        "preview_prompts, one for each, cut to preview_size",
    )
    preview_classes: list[Annotated[int, pydantic.Field(ge=0)]] = pydantic.Field(
        default=[], max_length=MAX_PREVIEWS, description="Class labels that a DiT's average draws while it trains"
    )
    preview_every: int | None = pydantic.Field(
        default=None,
        ge=1,
        description="Steps between previews, beside those before the first step and after the last; null = "
        "checkpoint_every",
    )
    preview_size: str | None = pydantic.Field(
        default=None, description="Width x height of previews in pixels; null = a square of the features' resolution"
    )
    preview_num_steps: int = pydantic.Field(
        default=20,
        ge=1,
        le=1000,
        description="Steps of DPM-Solver++ of a preview; of a student steps of lcm, 4 where these are more than 8",
    )
    preview_guidance_scale: float = pydantic.Field(
        default=4.5, ge=1, allow_inf_nan=False, description="Classifier-free guidance of previews; 1 = off"
    )
    preview_seed: int = pydantic.Field(
        default=0, ge=0, lt=2**32, description="Seed of the noise that each preview starts from, as of sampling.seed"
    )

    @pydantic.field_validator("preview_size", mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, str) and SIZE.fullmatch(value)):
            raise ValueError("a size is width x height in pixels, such as 1024x768")
        return value

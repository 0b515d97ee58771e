"""`[sampling]`: which prompts become images, with which solver, guidance and size (paper A.5)."""

from typing import Any, Literal

import pydantic

from pipelines.recipe import Recipe, StageConfig

STAGES = (1, 2, 3)


class SamplingConfig(StageConfig):
    """Recipe table `[sampling]`."""

    prompt: str | None = pydantic.Field(
        default=None, description="One prompt, instead of those of `prompts`; its images go to samples/stage<N>-prompt"
    )
    prompts: str | None = pydantic.Field(
        default=None,
        description="Prompts for stages 2 and 3: .txt (one per line) or .jsonl (key, prompt, aspect_ratio); "
        "`{run}` stands for the run's folder",
    )
    max_prompts: int | None = pydantic.Field(default=None, ge=1, description="Only the first so many; null = all")
    classes: list[int] | None = pydantic.Field(
        default=None, min_length=1, description="Class labels for stage 1; null = every class once"
    )
    images_per_prompt: int = pydantic.Field(default=1, ge=1, description="Images of each prompt, from seeds in a row")
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32, description="Seed of the first image of a prompt")
    size: str | None = pydantic.Field(
        default=None,
        pattern=r"^\d+x\d+$",
        description="Width x height in pixels, such as 1024x768; null = what the checkpoint was trained at",
    )
    solver: Literal["dpm-solver++", "iddpm", "sa-solver"] = pydantic.Field(
        default="dpm-solver++", description="Sampling algorithm; the paper settles on DPM-Solver with 20 steps"
    )
    num_steps: int = pydantic.Field(default=20, ge=1, le=1000, description="Solver steps; iddpm wants 100 to 250")
    guidance_scale: float = pydantic.Field(
        default=4.5, ge=1, description="Classifier-free guidance; 1 = off, which halves the work"
    )
    negative_prompt: str = pydantic.Field(default="", description="What guidance leads away from; empty = null caption")
    batch_size: int = pydantic.Field(default=16, ge=1, description="Images denoised at once; changes no image")
    device: Literal["auto", "cpu", "cuda"] = pydantic.Field(
        default="auto", description="Where the models run; auto = the GPU where torch sees one"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = pydantic.Field(
        default="auto", description="Compute dtype of the transformer; auto = bfloat16 on a GPU, float32 on a CPU"
    )
    text_dtype: Literal["float32", "bfloat16"] = pydantic.Field(
        default="bfloat16", description="Compute dtype of the text encoder"
    )
    num_threads: int = pydantic.Field(default=0, ge=0, description="Threads of torch on the CPU; 0 = every core")
    num_grid_images: int = pydantic.Field(default=32, ge=1, description="Images at most in grid.png")
    checkpoint: str | None = pydantic.Field(
        default=None,
        description="A diffusers PixArt or DiT transformer's folder instead of the run's checkpoint; its text encoder "
        "and VAE are those of [features]",
    )

    @pydantic.field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("the prompt is empty")
        return value


class EncoderConfig(pydantic.BaseModel):
    """What sampling from a bare transformer reads of `[features]`; the features room owns and validates that table."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, strict=True)

    text_model: str
    text_revision: str | None = None
    max_tokens: int = 120
    vae_model: str
    vae_revision: str | None = None


def encoder_config(recipe: Recipe) -> EncoderConfig:
    """Return the text encoder and VAE that `[features]` names.

    Raises:
        ValueError: the recipe does not name them.
    """
    table: dict[str, Any] = recipe.tables.get("features", {})
    try:
        return EncoderConfig.model_validate(table)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["features", *(str(part) for part in first["loc"])])
        raise ValueError(f"{recipe.path}: {key}: {first['msg']}; sampling.checkpoint needs it") from None

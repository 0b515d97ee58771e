"""`[sampling]`: which prompts become images, with which solver, guidance and size (paper A.5)."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import pydantic

from errors import UserError
from pipelines.command import Command
from pipelines.recipe import Decides, Recipe, TableConfig
from pixart.drawing.passes import Pass, plan_passes

# What `auto` of a dtype is on either kind of machine. Fingerprints of images of a CPU leave it out, or have "auto".
ON_A_CPU = {"dtype": "float32", "vae_dtype": "float32"}
ON_A_GPU = {"dtype": "bfloat16", "vae_dtype": "tested"}
SIZE = re.compile(r"\d{1,9}x\d{1,9}", re.ASCII)


class SamplingConfig(TableConfig):
    """Recipe table `[sampling]`."""

    prompt: str | None = pydantic.Field(
        default=None, description="One prompt, instead of those of `prompts`; its images go to samples/<stage>-prompt"
    )
    prompts: str | None = pydantic.Field(
        default=None,
        description="Prompts for a PixArt: .txt (one per line), .jsonl or .parquet (prompt, and if wanted key "
        "and aspect_ratio); `{run}` stands for the run's folder",
    )
    prompt_column: str = pydantic.Field(
        default="prompt",
        description="Where .jsonl and .parquet have the prompt; caption for a captions/<shard>.parquet",
    )
    styles: list[str] | None = pydantic.Field(
        default=None,
        min_length=1,
        description="What stands for {style} in the prompts, each of which is drawn in every style from one seed; "
        "typed, with commas between them, or a .txt file of one a line; `{run}` as above",
    )
    max_prompts: int | None = pydantic.Field(default=None, ge=1, description="Only the first so many; null = all")
    classes: list[int] | None = pydantic.Field(
        default=None, min_length=1, description="Class labels for a DiT; null = every class once"
    )
    images_per_prompt: int = pydantic.Field(default=1, ge=1, description="Images of each prompt, from seeds in a row")
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32, description="Seed of the first image of a prompt")
    size: str | None = pydantic.Field(
        default=None,
        description="Width x height in pixels, such as 1024x768; null = what the checkpoint was trained at",
    )
    solver: Decides[Literal["dpm-solver++", "iddpm", "sa-solver", "lcm", "euler", "heun"]] = pydantic.Field(
        default="dpm-solver++",
        description="Sampling algorithm; the paper settles on DPM-Solver with 20 steps. iddpm and sa-solver are for "
        "checkpoints of process ddpm, euler and heun for those of flow; lcm is for weights distilled to few steps, "
        "which are drawn with it in 4 steps where solver and steps are not typed",
    )
    num_steps: Decides[int] = pydantic.Field(
        default=20,
        ge=1,
        le=1000,
        description="Solver steps; iddpm wants 100 to 250, heun asks the model twice in each but the last",
    )
    times: Decides[list[Annotated[int, pydantic.Field(ge=0)]] | None] = pydantic.Field(
        default=None,
        min_length=1,
        description="Of lcm: the time of each step, falling, as [599] or [899, 499]; null = those that num_steps gives "
        "from the last of the schedule on. What is estimated from noise alone is surer at a time before that",
    )
    guidance_scale: Decides[float] = pydantic.Field(
        default=4.5,
        ge=1,
        description="Classifier-free guidance; 1 = off, which halves the work. Weights distilled to few steps have "
        "theirs inside, and where none is typed no other is added",
    )
    guidance_interval: Decides[tuple[float, float] | None] = pydantic.Field(
        default=None,
        description="Guide only at noise levels in [low, high], fractions of the way from the image (0) to noise (1): "
        "the timestep through 1000, or flow's sigma; elsewhere half the work is left out. null = everywhere",
    )
    cache: Decides[int | None] = pydantic.Field(
        default=None,
        ge=2,
        description="Compute all blocks at every n-th pass of the network alone, and at the others the first block, "
        "taking for the rest what they gave last; null = all at every pass",
    )
    negative_prompt: Decides[str] = pydantic.Field(
        default="", description="What guidance leads away from; empty = null caption"
    )
    batch_size: int = pydantic.Field(default=16, ge=1, description="Images denoised at once; changes no image")
    device: Literal["auto", "cpu", "cuda"] = pydantic.Field(
        default="auto", description="Where the models run; auto = the GPU where torch sees one"
    )
    dtype: Decides[Literal["auto", "float32", "bfloat16"]] = pydantic.Field(
        default="auto",
        description="Compute dtype of the transformer; auto = bfloat16 on a GPU, float32 on a CPU, "
        "and of images that were begun what they were begun in",
    )
    weight_dtype: Decides[Literal["int8"] | None] = pydantic.Field(
        default=None,
        description="int8 = the weights of the transformer's blocks in 8 bits, a scale to each output, multiplied in "
        "dtype: a little over half of bfloat16's memory; null = in dtype, too",
    )
    vae_dtype: Decides[Literal["auto", "tested", "float32", "bfloat16"]] = pydantic.Field(
        default="auto",
        description="Compute dtype of the VAE; tested = bfloat16 if a test picture of these weights comes out as in "
        "float32, else float32; auto = tested on a GPU, float32 on a CPU",
    )
    vae_tiles: bool | Literal["auto"] = pydantic.Field(
        default="auto",
        description="Decode an image a tile at a time, in half of the memory and without seams; auto = on a GPU where "
        "the whole does not fit what is free. Pixels move as by batch_size",
    )
    card_gigabytes: float | None = pydantic.Field(
        default=None,
        gt=0,
        description="Memory of the card that a plan reckons for, in 10^9 bytes, if it is not here; "
        "null = this machine's GPU",
    )
    compile: bool | Literal["auto"] = pydantic.Field(
        default="auto",
        description="Compile the transformer's blocks, and capture its passes in CUDA graphs (15 to 25 s); auto = on a "
        "GPU with a C++ compiler, for batches of a shape that 8 images or more have; with true, and in jobs of 10^9 "
        "pixels, on a GPU the VAE's decoder, too. Pixels move as by batch_size",
    )
    text_dtype: Decides[Literal["float32", "bfloat16"]] = pydantic.Field(
        default="bfloat16", description="Compute dtype of the text encoder"
    )
    text_encoder: Literal["device", "cpu", "8bit", "precomputed"] = pydantic.Field(
        default="device",
        description="Where prompts are encoded, before the first step: on the device, on the CPU, on the device with "
        "8-bit weights, or earlier (see text_embeddings)",
    )
    text_embeddings: str = pydantic.Field(
        default="{run}/features/text",
        description="What text_encoder = precomputed reads: text features, by key, or a .safetensors file that "
        "write_embeddings wrote; `{run}` as above",
    )
    write_embeddings: str | None = pydantic.Field(
        default=None,
        pattern=r"\.safetensors$",
        description="Encode the prompts into this .safetensors file and draw nothing; `{run}` as above",
    )
    num_threads: int = pydantic.Field(
        default=0, ge=0, description="Threads of torch on the CPU; 0 = every core, in a worker engine.cpus_per_worker"
    )
    max_images_in_process: int = pydantic.Field(
        default=32, ge=0, description="So many missing images are drawn without starting workers; more go through Ray"
    )
    num_grid_images: int = pydantic.Field(default=32, ge=1, description="Images at most in grid.png")
    checkpoint: str | None = pydantic.Field(
        default=None,
        description="Instead of the run's checkpoint: a stage's folder of training or a step-<k> of it, a diffusers "
        "PixArt or DiT folder (of a pipeline or of a transformer), a hub id, or an original .pth; what it lacks is "
        "taken from [features]",
    )
    lora: list[str] = pydantic.Field(
        default=[],
        description="Adapters to add to the weights: .safetensors files or folders of peft's or diffusers' kind, and "
        "checkpoints or stages that trained adapters; typed, with commas between them; `{run}` as above",
    )
    lora_weights: list[Annotated[float, pydantic.Field(ge=-10, le=10)]] | None = pydantic.Field(
        default=None,
        description="How much of each adapter's change is added, from -10 to 10; null = 1 of each. One alone, where "
        "`lora` names none, is for the adapter that the checkpoint has trained",
    )
    control: str | None = pydantic.Field(
        default=None,
        description="Image that leads what is drawn of all prompts, through the weights' control branch; `{run}` as "
        "above. A column `control` of the prompt file has one for each",
    )
    control_is: Decides[Literal["map", "photo"]] = pydantic.Field(
        default="map",
        description="What control images are: maps such as the branch was trained with (white edges on black), or "
        "photos, of which such maps are drawn",
    )
    control_kind: str | None = pydantic.Field(
        default=None,
        description="Of photos: the maps that are drawn of them, canny, hed or depth; null = those that the branch's "
        "file says it was trained with, which files of others do not",
    )
    control_settings: dict[str, Any] = pydantic.Field(
        default={},
        description="Of photos: keys of `[features.<table>.families.control-<kind>]`, such as `model`, laid over those "
        "that the branch's file says",
    )
    control_strength: Decides[float] = pydantic.Field(
        default=1.0, ge=0, le=2, description="How much of the branch's change is added; 0 = none, 1 = as trained"
    )
    control_branch: str | None = pydantic.Field(
        default=None,
        description="Control branch for weights that have none of their own: a stage or checkpoint that trained one, a "
        "folder of diffusers' research class, PixArt-delta's .pth, or what the hub calls these; `{run}` as above",
    )
    checkpoint_revision: str | None = pydantic.Field(default=None, description="Hub revision of `checkpoint`")
    departs_in: list[Literal["text_encoder", "max_tokens", "cleaning", "vae"]] = pydantic.Field(
        default=[],
        description="What [features] gives `checkpoint` otherwise, on purpose, than it was trained with, or than it is "
        "taken to be where you know better; all else that differs is refused",
    )
    checkpoint_resolution: int | None = pydantic.Field(
        default=None, ge=1, description="Pixels that an original .pth without positions was trained at"
    )

    @pydantic.field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("the prompt is empty")
        return value

    @pydantic.field_validator("lora", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        paths = [path.strip() for path in value.split(",")]
        if not all(paths):
            raise ValueError("adapters are paths with a comma between them, such as a.safetensors,b.safetensors")
        return paths

    @pydantic.field_validator("styles", mode="before")
    @classmethod
    def _split_styles(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [value] if value.endswith(".txt") else [style.strip() for style in value.split(",")]

    @pydantic.field_validator("lora_weights", mode="before")
    @classmethod
    def _split_weights(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return [float(value)]
        if not isinstance(value, str):
            return value
        try:
            return [float(weight) for weight in value.split(",")]
        except ValueError:
            raise ValueError("weights are numbers with a comma between them, such as 0.8,0.5") from None

    @pydantic.field_validator("size", mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, str) and SIZE.fullmatch(value)):
            raise ValueError("a size is width x height in pixels, such as 1024x768")
        return value

    @pydantic.field_validator("times")
    @classmethod
    def _check_times(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and any(late <= early for late, early in itertools.pairwise(value)):
            raise ValueError("times fall from step to step, such as [899, 499]")
        return value

    @pydantic.field_validator("guidance_interval", mode="before")
    @classmethod
    def _check_interval(cls, value: Any) -> Any:
        if value is None:
            return None
        numbers = value if isinstance(value, list | tuple) else []
        are_numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        if len(numbers) != 2 or not are_numbers or not 0 <= numbers[0] < numbers[1] <= 1:
            raise ValueError("an interval is [low, high] between 0 (no noise) and 1 (nothing else), such as [0.1, 0.8]")
        return float(numbers[0]), float(numbers[1])

    def passes(self, timesteps: Iterable[float], num_times: int, *, scale: float | None = None) -> list[Pass]:
        """Return what each pass of the network computes, of a solver that asks it at these times of `num_times`.

        `scale` is that of the guidance that passes are to add, where some is inside the weights.
        """
        return plan_passes(
            [float(timestep) / num_times for timestep in timesteps],
            guidance_scale=self.guidance_scale if scale is None else scale,
            guidance_interval=self.guidance_interval,
            num_passes_per_refresh=self.cache or 1,
        )

    @property
    def title(self) -> str:
        """What pictures of the images say of the settings."""
        interval = "" if self.guidance_interval is None else " in [{:g}, {:g}]".format(*self.guidance_interval)
        cache = "" if self.cache is None else f" · all blocks in every {self.cache} passes"
        weights = "" if self.weight_dtype is None else f" · weights in {self.weight_dtype}"
        times = "" if self.times is None else f" at {', '.join(map(str, self.times))}"
        return (
            f"{self.solver}, {self.num_steps} steps{times} · guidance {self.guidance_scale:g}{interval}{cache}{weights}"
        )

    @property
    def packages(self) -> list[str]:
        """The packages that drawing needs."""
        has_8bit = self.weight_dtype == "int8" or self.text_encoder == "8bit"
        return ["torch", "transformers", "diffusers", *(["torchao"] if has_8bit else [])]

    @property
    def reads_features(self) -> bool:
        """Whether embeddings come from a run's text features, where they are found by the sample's key."""
        return self.text_encoder == "precomputed" and not self.text_embeddings.endswith(".safetensors")


def without_adapters(config: SamplingConfig) -> SamplingConfig:
    """Return the settings without adapters, for those who add them to the weights later."""
    return config.model_copy(update={"lora": [], "lora_weights": None})


def without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole settings of an image with a CPU's dtypes for `auto`."""
    return {name: ON_A_CPU.get(name, value) if value == "auto" else value for name, value in settings.items()}


class EncoderConfig(pydantic.BaseModel):
    """What sampling from a bare transformer reads of `[features]`; the features room owns and validates that table."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, strict=True)

    text_model: str
    text_revision: str | None = None
    # None where they are not typed: then they are the weights' own
    text_cleaning: str | None = None
    max_tokens: int | None = None
    vae_model: str
    vae_revision: str | None = None


def encoder_config(recipe: Recipe) -> EncoderConfig | None:
    """Return the text encoder and VAE that `[features]` names, None if it does not name them.

    Raises:
        UserError: one of its values is of the wrong type.
    """
    table: dict[str, Any] = recipe.tables.get("features", {})
    try:
        return EncoderConfig.model_validate(table)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            return None
        key = ".".join(["features", *(str(part) for part in first["loc"])])
        raise UserError(f"{recipe.path}: {key}: {first['msg']}") from None


class AppConfig(TableConfig):
    """Recipe table `[app]`; not in its module, which is a program."""

    port: int = pydantic.Field(default=7860, ge=1, le=65535, description="Port of 127.0.0.1 that the page is served at")


def sampling_config(command: Command) -> SamplingConfig:
    """Return `[sampling]` as a command has it.

    Raises:
        UserError: a key is wrong, or a prompt and a file of prompts are both typed.
    """
    command.require_one_of("sampling.prompt", "sampling.prompts")
    return command.recipe.table("sampling", SamplingConfig)

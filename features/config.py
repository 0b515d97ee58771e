"""`[features]`: which encoders make features, from which shards, at which resolution; a named table for each set."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic

from encoders.latents import require_vae_dtype
from encoders.text import require_text_dtype
from errors import UserError
from pipelines.recipe import Recipe, TableConfig
from pipelines.store.families import PIXELS

# What a field decides: what is made of images, or of captions. Tables that share a folder must agree on it.
DECIDES_IMAGES, DECIDES_TEXT = "decides what is made of images", "decides text features"
# These do so by what they name: a job knows models by their weights, and captions by column.
NAMES_IMAGES, NAMES_TEXT = "names what images are encoded with", "names captions and what encodes them"
Value = TypeVar("Value")
# Of the name of a variant, which is part of a folder's.
VARIANT = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
OfImages = Annotated[Value, DECIDES_IMAGES]
OfText = Annotated[Value, DECIDES_TEXT]
ImageInput = Annotated[Value, NAMES_IMAGES]
TextInput = Annotated[Value, NAMES_TEXT]


class CaptionConfig(TableConfig):
    """One entry of `[features.<name>] captions`: a column of captions/<shard>.parquet, and how often it is drawn.

    Or one text for all images, which is called `column`.
    """

    column: str = pydantic.Field(
        pattern="^[a-z][a-z0-9_]*$",
        description="Column to encode: caption (dense), alt_text (raw) or another one of texts; with text, its name",
    )
    text: str | None = pydantic.Field(
        default=None,
        pattern=r"\S",
        description="Caption of every image, such as 'a photo of sks cat': no captions are read, and it stands alone",
    )
    weight: Annotated[float, pydantic.Field(gt=0.0, allow_inf_nan=False)] | str = pydantic.Field(
        default=1.0,
        description="Share of the samples' draws, relative to the other captions a sample has; or an expression over "
        "columns, such as 'exp(clip_score / 0.1)', in which bare names are this caption's own",
    )

    @property
    def index_weight(self) -> float:
        """The weight that text features are written with; one by an expression is in the table's choice instead."""
        return 1.0 if isinstance(self.weight, str) else self.weight


class FeaturesConfig(TableConfig):
    """A named table of `[features]`: what training reads of one kind, made by one command."""

    shards: list[str] = pydantic.Field(
        default=["*"], min_length=1, description="Shell patterns of shard names that are read"
    )
    where: str | None = pydantic.Field(
        default=None,
        description="Expression over columns of which samples are chosen, such as 'min_side >= 512 and not flags.loop' "
        "(docs/CURATION.md); others are not encoded, and changing it encodes what is missing alone; null = all",
    )
    weight: str | None = pydantic.Field(
        default=None,
        description="Expression of how often a sample is drawn, such as 'aesthetic': in proportion to it, 0 or more; "
        "null = all alike",
    )
    weight_temperature: float | None = pydantic.Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="With it samples are drawn in proportion to exp(weight / weight_temperature)",
    )
    resolution: OfImages[int] = pydantic.Field(
        ge=1,
        le=4096,
        description="Base resolution in pixels, multiple of VAE factor x model.patch_size; its square: a bucket's area",
    )
    buckets: OfImages[bool] = pydantic.Field(
        default=False, description="True: the paper's 40 aspect buckets (0.25 to 4); false: a square centre crop"
    )
    max_upscale: OfImages[float | None] = pydantic.Field(
        default=None,
        ge=1,
        allow_inf_nan=False,
        description="Largest factor by which an image is scaled up to cover its bucket; a smaller image is a reject, "
        "smaller_than_bucket; null = any, and those of more than 1.25 are counted in a warning",
    )
    text: bool = pydantic.Field(
        default=True,
        description="Whether captions are encoded; false where only class labels are read (`.cls` members)",
    )
    families: dict[str, dict[str, Any]] = pydantic.Field(
        default={},
        description="Families beside text and latents, each with its own keys: `families.<name>`",
    )
    captions: TextInput[list[CaptionConfig]] = pydantic.Field(
        default=[CaptionConfig(column="caption")],
        min_length=1,
        description="Captions encoded per sample, and the weights training draws them with; missing ones are left out",
    )
    token: str | None = pydantic.Field(
        default=None,
        pattern=r"^\S(.*\S)?$",
        description="Rare token that stands for a subject, such as 'sks': refused where no caption has it, and where "
        "it is a common word of text_model's vocabulary",
    )
    text_from: TextInput[str | None] = pydantic.Field(
        default=None,
        description="Folder, pattern or tars of PixArt's .npz files (caption_feature, attention_mask), which are "
        "imported as what text_model has encoded; null = captions are encoded",
    )
    text_variant: str | None = pydantic.Field(
        default=None,
        pattern=VARIANT,
        description="Name of the text that this table encodes otherwise than others do (features/text@<name>)",
    )
    image_variant: str | None = pydantic.Field(
        default=None,
        pattern=VARIANT,
        description="The same of what is made of images, as by another VAE (features/latent-<resolution>@<name>)",
    )
    text_model: TextInput[str] = pydantic.Field(
        default="",
        description="T5 or causal language model: hub id or local folder (paper: Flan-T5-XXL); needed where text is",
    )
    text_revision: TextInput[str | None] = pydantic.Field(
        default=None, description="Commit of the hub repository; null = main"
    )
    text_dtype: OfText[str] = pydantic.Field(
        default="bfloat16",
        description="Compute dtype of text_model: bfloat16 or float32; how it is stored is text_storage",
    )
    text_weight_dtype: OfText[Literal["int8"] | None] = pydantic.Field(
        default=None,
        description="int8: weights of text_model in 8 bits by torchao, half of bfloat16's memory; embeddings move by "
        "about 1%. null = as text_dtype",
    )
    text_storage: OfText[Literal["bfloat16", "float8_e4m3", "int8"]] = pydantic.Field(
        default="bfloat16", description="Stored dtype of embeddings; the 8-bit ones have a float32 scale per token"
    )
    text_cleaning: OfText[Literal["lower", "diffusers", "strip", "none"]] = pydantic.Field(
        default="lower",
        description="What the text encoder sees of a caption: lower case without surrounding space (lower), that less "
        "what diffusers' clean_caption takes out, as PixArt-alpha was trained (diffusers), it without that space "
        "(strip), or all of it (none), as PixArt-Sigma",
    )
    max_tokens: OfText[int] = pydantic.Field(
        default=120,
        ge=1,
        le=512,
        description="Longest caption in tokens of text_model, the last one included (alpha 120, Sigma 300)",
    )
    text_batch_tokens: int | None = pydantic.Field(
        default=None,
        ge=1,
        description="Tokens encoded at once, padding too; null = 8192 on a GPU, 1024 on a CPU; halved when too many",
    )
    latents_from: ImageInput[str | None] = pydantic.Field(
        default=None,
        description="Folder, pattern or tars of PixArt's .npy files (mean and std), which are imported as what "
        "vae_model has made of the images; null = images are encoded",
    )
    vae_model: ImageInput[str] = pydantic.Field(
        default="",
        description="AutoencoderKL or AutoencoderDC: hub id or local folder (paper: the LDM VAE); needed but of pixels",
    )
    vae_revision: ImageInput[str | None] = pydantic.Field(
        default=None, description="Commit of the hub repository; null = main"
    )
    vae_dtype: OfImages[str] = pydantic.Field(
        default="float32", description="Compute dtype of the VAE: float32 or bfloat16; latents are stored as float16"
    )
    vae_batch_size: int | None = pydantic.Field(
        default=None,
        ge=1,
        description="Images encoded at once; null = 32 on a CPU, on a GPU as many as have the pixels of 16 of 512px "
        "(64 of 256px, 4 of 1024px); halved when too many",
    )
    device: Literal["auto", "cpu", "cuda"] = pydantic.Field(
        default="auto", description="Where the encoders run; auto = the GPU where torch sees one"
    )
    decode_threads: int | None = pydantic.Field(
        default=None,
        ge=1,
        description="Threads per worker that decode images ahead; null = CPU cores per worker, at most 16",
    )
    max_reject_fraction: float = pydantic.Field(
        default=0.05, ge=0.0, le=1.0, description="Largest part of the samples that may be rejected, per directory"
    )
    num_preview_images: int = pydantic.Field(
        default=8, ge=1, le=64, description="Images decoded again for the preview grid of a job"
    )

    @property
    def caption_columns(self) -> list[str]:
        """Columns of `captions`, in order."""
        return [caption.column for caption in self.captions]

    @property
    def has_pixels(self) -> bool:
        """Whether images are cropped alone, for a codec that is to be trained on them."""
        return PIXELS in self.families

    @pydantic.model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.has_pixels:
            for name, value in (("text", self.text), ("latents_from", self.latents_from)):
                if value:
                    raise ValueError(f"families.{PIXELS} are read alone, and {name} = {value!r}: leave one out")
            return self
        for name, is_needed in (("vae_model", True), ("text_model", self.text)):
            if is_needed and not getattr(self, name):
                raise ValueError(f"{name} is missing")
        return self

    @pydantic.field_validator("captions")
    @classmethod
    def _check_captions(cls, value: list[CaptionConfig]) -> list[CaptionConfig]:
        columns = [caption.column for caption in value]
        if len(set(columns)) < len(columns):
            raise ValueError(f"columns {', '.join(columns)}: a column is named twice")
        for caption in value:
            if caption.text is not None and (len(value) > 1 or caption.column == "caption"):
                names = "a name other than caption" if len(value) == 1 else "no other captions beside it"
                raise ValueError(f"{caption.column} with text {caption.text!r}: one text for all images has {names}")
        return value

    @pydantic.model_validator(mode="after")
    def _check_imports(self) -> Self:
        if self.text_from is not None and len(self.captions) > 1:
            raise ValueError(
                f"text_from has one caption a sample, and captions names {', '.join(self.caption_columns)}"
            )
        if self.text_from is not None and self.captions[0].text is not None:
            raise ValueError(f"text_from is imported, and captions has a text {self.captions[0].text!r}: leave one out")
        return self

    @pydantic.model_validator(mode="after")
    def _check_temperature(self) -> Self:
        if self.weight_temperature is not None and self.weight is None:
            raise ValueError(f"weight_temperature = {self.weight_temperature} is of weight, which is not there")
        return self

    @pydantic.model_validator(mode="after")
    def _check_upscale(self) -> Self:
        if self.latents_from is not None and self.max_upscale is not None:
            raise ValueError(f"max_upscale is of images that are encoded, and latents_from = {self.latents_from!r}")
        return self

    @pydantic.field_validator("text_dtype")
    @classmethod
    def _check_text_dtype(cls, value: str) -> str:
        require_text_dtype(value)
        return value

    @pydantic.field_validator("families")
    @classmethod
    def _check_families(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if built_in := sorted({"text", "latents", "latent"} & value.keys()):
            raise ValueError(f"{built_in[0]} is asked for by text and resolution, not here; this is for other families")
        for family, settings in value.items():
            for key, number in settings.items():
                if not _is_finite(number):
                    raise ValueError(f"{family}.{key} = {number!r} should be finite")
        return value

    @pydantic.field_validator("vae_dtype")
    @classmethod
    def _check_vae_dtype(cls, value: str) -> str:
        require_vae_dtype(value)
        return value


def feature_table(recipe: Recipe, name: str) -> FeaturesConfig:
    """Return `[features.<name>]`.

    Raises:
        UserError: there is no such table, a key of any is unknown or wrong, or two would share a folder of features
            that they mean to be different; names the keys.
    """
    names = recipe.names("features", keys=FeaturesConfig.model_fields)
    tables = {other: recipe.named("features", other, model=FeaturesConfig) for other in names}
    _check_shared_directories(recipe, tables)
    return tables[name] if name in tables else recipe.named("features", name, model=FeaturesConfig)


def table_of_stage(recipe: Recipe, stage: str) -> str:
    """Return the table of `[features]` that a stage means: that of its name, else the one that its training reads."""
    if stage in recipe.names("features", keys=FeaturesConfig.model_fields) or stage not in recipe.names("training"):
        return stage
    return recipe.laid_over("training", stage).get("features") or stage


def _check_shared_directories(recipe: Recipe, tables: Mapping[str, FeaturesConfig]) -> None:
    """Refuse tables that would write into one folder what differs: features/text*, features/<family>-<resolution>."""
    owners: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for name, table in tables.items():
        images = _values(table, NAMES_IMAGES, DECIDES_IMAGES)
        at_resolution = f"at resolution {table.resolution}"
        folders: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
            (("latents", table.resolution, table.image_variant), images, f"of latents {at_resolution}")
        ]
        for family, settings in table.families.items():
            values = images | {f"families.{family}": settings}
            folder = family, table.resolution, table.image_variant
            folders.append((folder, values, f"of {family} {at_resolution}"))
        if table.text:
            columns = tuple(table.caption_columns)
            values = _values(table, NAMES_TEXT, DECIDES_TEXT)
            folder = "text", *columns, table.text_variant
            folders.append((folder, values, f"of text features of {', '.join(columns)}"))
        for folder, values, what in folders:
            other, others = owners.setdefault(folder, (name, values))
            for field, value in values.items():
                if value != others[field]:
                    raise UserError(
                        f"{recipe.path}: features.{name}.{field} = {_shown(value)}, but features.{other}.{field} = "
                        f"{_shown(others[field])}; the two would share one folder {what}: "
                        f"{'text' if 'text' in folder else 'image'}_variant of one of them gives it its own"
                    )


def _values(table: FeaturesConfig, *notes: str) -> dict[str, Any]:
    values = {field: getattr(table, field) for note in notes for field in table.noted_fields(note)}
    if "captions" in values:
        values["captions"] = [each.model_copy(update={"weight": each.index_weight}) for each in values["captions"]]
    return values


def _shown(value: Any) -> str:
    captions = isinstance(value, list) and all(isinstance(item, CaptionConfig) for item in value)
    return str({item.column: item.text or item.weight for item in value} if captions else value)


def _is_finite(value: Any) -> bool:
    """Whether no number in a value, of any type, is an infinity or NaN."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)

"""The published models: what each was trained with, and by which shape of network it is known.

Sources: the configs and converters of PixArt-alpha, PixArt-sigma and DiT, and diffusers' pipelines of them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixart.origins import Fact, Origins
from pixart.processes.specs import ddpm_spec

# T5's encoder as the paper's code loads it; the paper calls it Flan-T5-XXL, which it is not.
T5_XXL = "DeepFloyd/t5-v1_1-xxl"
SD_VAE, SDXL_VAE = "stabilityai/sd-vae-ft-ema", "stabilityai/sdxl-vae"
XL_2 = {"num_layers": 28, "num_heads": 16, "head_dim": 72, "patch_size": 2, "in_channels": 4, "out_channels": 8}
# Of a pipeline, whose folder names its class: tokens that it reads of a prompt, and how texts were cleaned.
PIPELINE_TEXTS = {
    "PixArtAlphaPipeline": (120, "diffusers"),
    "PixArtSigmaPipeline": (300, "none"),
    "PixArtSigmaPAGPipeline": (300, "none"),
}


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A released model, as its shape tells it from others.

    Attributes:
        name: on the hub.
        kind: "pixart" or "dit".
        sample_size: latent side that it was trained at.
        scales: of its positions, in diffusers' folders.
        file_scales: in original files, where those may have others.
        has_size_condition: whether it is told each image's size.
        max_tokens: of its texts; an original file has so many rows of the null caption.
        cleaning: of its texts, see `features.text_cleaning`.
        vae, vae_scale: of its latents.
        says_scale: whether its diffusers config has a key for the scale, as none from before Sigma has.
    """

    name: str
    kind: str = "pixart"
    sample_size: int
    scales: tuple[float, ...]
    file_scales: tuple[float, ...] = ()
    has_size_condition: bool = False
    max_tokens: int = 120
    cleaning: str = "diffusers"
    vae: str = SD_VAE
    vae_scale: float = 0.18215
    says_scale: bool = False

    def is_like(self, shape: Mapping[str, Any], *, scale: float, is_file: bool) -> bool:
        """Whether a network of this shape and scale of positions may be it; without a `sample_size` of any."""
        wanted: dict[str, Any] = dict(XL_2)
        if self.kind == "pixart":
            wanted |= {"caption_channels": 4096, "has_size_condition": self.has_size_condition, "adaln": "single"}
        else:
            wanted |= {"num_classes": 1000}
        scales = (self.file_scales if is_file else ()) or self.scales
        is_there = shape["sample_size"] is None or (shape["sample_size"] == self.sample_size and scale in scales)
        return is_there and all(shape.get(key) == value for key, value in wanted.items())

    def origins(self, source: str, *, is_sure: bool = True) -> Origins:
        """Return what it was trained with, known from `source`."""
        facts: dict[str, Any] = {"vae": (self.vae,), "vae_scale": self.vae_scale, "vae_shift": 0.0}
        if self.kind == "pixart":
            facts |= {"text_encoder": (T5_XXL,), "max_tokens": self.max_tokens, "cleaning": self.cleaning}
        facts["process"] = ddpm_spec()
        return Origins(**{name: Fact(value=value, source=source, is_sure=is_sure) for name, value in facts.items()})


def _sigma(name: str, sample_size: int) -> PublishedModel:
    return PublishedModel(
        name=f"PixArt-alpha/PixArt-Sigma-XL-2-{name}",
        sample_size=sample_size,
        scales=(sample_size / 64,),
        max_tokens=300,
        cleaning="none",
        vae=SDXL_VAE,
        vae_scale=0.13025,
        says_scale=True,
    )


PUBLISHED = (
    # Its training config has 1, its converter 0.5: the positions that a file holds settle it.
    PublishedModel(name="PixArt-alpha/PixArt-XL-2-256x256", sample_size=32, scales=(1.0,), file_scales=(1.0, 0.5)),
    PublishedModel(name="PixArt-alpha/PixArt-XL-2-512x512", sample_size=64, scales=(1.0,)),
    PublishedModel(name="PixArt-alpha/PixArt-XL-2-512-MS", sample_size=64, scales=(1.0,), has_size_condition=True),
    PublishedModel(name="PixArt-alpha/PixArt-XL-2-1024-MS", sample_size=128, scales=(2.0,), has_size_condition=True),
    _sigma("256x256", 32),
    _sigma("512-MS", 64),
    _sigma("1024-MS", 128),
    _sigma("2K-MS", 256),
    PublishedModel(name="facebook/DiT-XL-2-256", kind="dit", sample_size=32, scales=(1.0,)),
    PublishedModel(name="facebook/DiT-XL-2-512", kind="dit", sample_size=64, scales=(1.0,)),
)


def recognise(
    kind: str,
    shape: Mapping[str, Any],
    *,
    scale: float,
    num_null_tokens: int | None = None,
    is_file: bool = False,
    says_scale: bool = True,
    is_as_published: bool = True,
    pipeline: str | None = None,
    location: str = "",
) -> Origins:
    """Return what weights were trained with if their shape is that of a published model; else nothing.

    Of several that are alike, what they agree on. Where a config was written by another library than theirs, and
    neither a name nor a pipeline around it says whose the weights are, this is not sure: weights of one's own training
    have the same shape.

    Args:
        kind: "pixart" or "dit".
        shape: of the network, by the names of its config.
        scale: of its positions.
        num_null_tokens: rows of the null caption that an original file holds.
        is_file: whether the weights are an original file.
        says_scale: whether a diffusers config has a key for the scale.
        is_as_published: whether the config, or the file, is as the published models' were written.
        pipeline: class of the pipeline around the weights.
        location: path or hub id that they are named by.
    """
    alike = [model for model in PUBLISHED if model.kind == kind and model.is_like(shape, scale=scale, is_file=is_file)]
    if num_null_tokens is not None:
        alike = [model for model in alike if model.max_tokens == num_null_tokens]
    if not (says_scale or is_file):
        alike = [model for model in alike if not model.says_scale]
    if pipeline in PIPELINE_TEXTS:
        alike = [model for model in alike if model.max_tokens == PIPELINE_TEXTS[pipeline][0]]
    if named := [model for model in alike if is_named(model, location)]:
        alike = named
    if not alike:
        return Origins()
    names = " or ".join(model.name for model in alike)
    is_sure = is_as_published or bool(named) or pipeline is not None
    source = f"published as {names}" if is_sure else f"known by its config alone, which is like {names}'s"
    return _common([model.origins(source, is_sure=is_sure) for model in alike])


def is_named(model: PublishedModel, location: str) -> bool:
    """Whether a path or hub id has the model's name in it, and not that of one whose name goes on."""
    return re.search(rf"{re.escape(model.name.rpartition('/')[2])}(?![\w-])", location) is not None


def default_file_scale(sample_size: int, *, num_null_tokens: int | None) -> float | None:
    """Return the scale of the positions that an original file of Sigma lacks, None of a file that is not Sigma's."""
    is_sigma = any(model.says_scale and model.max_tokens == num_null_tokens for model in PUBLISHED)
    return sample_size / 64 if is_sigma else None


def _common(found: Sequence[Origins]) -> Origins:
    first, *others = found
    differing = {
        name: None
        for other in others
        for name, fact in first.facts().items()
        if fact is not None and (theirs := other.facts()[name]) is not None and theirs.value != fact.value
    }
    return replace(first, **differing)

"""What a latent codec is: a spec, images to latents, and back."""

# B batch, C latent channels, H W pixels, h w latent height and width

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from encoders.compilation import many_shapes
from encoders.transfers import HostCopy, to_device
from encoders.weights import ModelSource, load_pretrained
from errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    # Means and standard deviations [B, C, h, w]; None where the codec has no deviations.
    Latents = tuple[torch.Tensor, torch.Tensor | None]

VAE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What is known of a latent codec before its weights are read.

    Attributes:
        channels: of a latent, C.
        factor: pixels of one latent, each way.
        scale, shift: a model sees (latent - shift) * scale.
        has_std: whether a latent is a distribution, with a standard deviation beside its mean.
        identity: of its files, as `encoders.weights.resolve_model` gives it.
    """

    channels: int
    factor: int
    scale: float
    shift: float
    has_std: bool
    identity: str


class NonFinitePixelsError(UserError):
    """A codec gave pixels that are not finite; `image` is the number of the first such latent in its batch."""

    def __init__(self, message: str, *, image: int) -> None:
        super().__init__(message)
        self.image = image


class LatentCodec(Protocol):
    """A loaded codec; `encoders.opening.open_codec` gives one. Latents are unscaled here."""

    spec: LatentSpec

    def encode(self, images: torch.Tensor) -> Latents:
        """Return mean and standard deviation of the latents, fp32 [B, C, h, w] on the CPU; without `has_std` no second.

        Args:
            images: [B, 3, H, W], uint8, or floats in [-1, 1]; H and W multiples of `spec.factor`.
        """
        ...

    def start(self, images: torch.Tensor) -> Callable[[], Latents]:
        """Start what `encode` does; the call of what comes back waits for it. On a CPU there is nothing to wait for."""
        ...

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Return one image per unscaled latent of [B, C, h, w].

        Raises:
            NonFinitePixelsError: the codec gives values that are not finite.
        """
        ...

    @property
    def can_tile(self) -> bool:
        """Whether the model is made of what can be decoded a tile at a time."""
        ...

    def pixels(self, latents: torch.Tensor, *, is_tiled: bool = False) -> torch.Tensor:
        """Return [B, 3, H, W] in [-1, 1] of unscaled latents, on the codec's device and in its dtype.

        By tiles they are the same but for rounding, in half of the memory and with nothing compiled (`vae_tiles.py`).
        """
        ...

    def decoding_bytes(self, shape: Sequence[int], *, is_tiled: bool = False) -> int:
        """Return what `pixels` of latents of this shape takes beside weights and latents, reckoned by shapes alone.

        Kernels' own workspace is not in it.
        """
        ...

    def images_of(self, pixels: SentAhead) -> list[Image.Image]:
        """Return the images of pixels that `pixels_ahead` was asked for; raises as `decode` does."""
        ...

    def compile_decoder(self) -> None:
        """Compile what pays in a long run of decoding on a GPU; of a kind of model nobody has measured nothing."""
        ...


@dataclass
class DiffusersCodec:
    """The half of a `LatentCodec` that all autoencoders of diffusers share; a class for one of them has the other.

    Attributes:
        class_name: of the autoencoder, as its `config.json` names it.
        origin: what the model is called in an error.
        is_compiled: whether any of its blocks are.
    """

    class_name: ClassVar[str]

    spec: LatentSpec
    model: Any
    origin: str
    is_compiled: bool = False

    @staticmethod
    def model_class() -> Any:
        """Return diffusers' class."""
        raise NotImplementedError

    @staticmethod
    def read_spec(config: Mapping[str, Any], *, identity: str) -> LatentSpec:
        """Return the spec of an autoencoder with this `config.json`."""
        raise NotImplementedError

    @classmethod
    def load_weights(cls, source: ModelSource, *, dtype: torch.dtype, key: str) -> Any:
        """Load the weights, frozen and on the CPU; raises as `encoders.weights.load_pretrained` does."""
        settings = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
        return load_pretrained(cls.model_class(), source, settings=settings, key=key)

    @classmethod
    def blank(cls, config: Mapping[str, Any], *, dtype: torch.dtype) -> Self:
        """Return the codec of a `config.json` on the meta device, whose weights have neither memory nor values."""
        import torch
        from torch import nn

        with torch.device("meta"):
            model = cls.model_class().from_config(dict(config)).eval().requires_grad_(False)
        # As `to` of the model itself is, but for its words on layers that are to stay in float32.
        return cls(cls.read_spec(config, identity=""), nn.Module.to(model, dtype), cls.class_name)

    def moments(self, images: torch.Tensor) -> Latents:
        """Return mean and standard deviation of the latents of what the model reads, on its device."""
        raise NotImplementedError

    def adapt_to_gpu(self) -> None:
        """Have the model compute what a GPU computes best: with channels last, eight times slower on a CPU."""
        import torch

        self.model.to(memory_format=torch.channels_last)

    def compile_blocks(self) -> None:
        """Compile what pays in a long run on a GPU; of a kind of model nobody has measured nothing."""

    def compile_decoder(self) -> None:
        """Compile what pays in a long run of decoding, see `LatentCodec`."""

    def _compiled_calls(self) -> contextlib.AbstractContextManager[None]:
        return many_shapes() if self.is_compiled else contextlib.nullcontext()

    def start(self, images: torch.Tensor) -> Callable[[], Latents]:
        """Start encoding images, see `LatentCodec`."""
        import torch

        with torch.inference_mode(), self._compiled_calls():
            mean, std = self.moments(to_model_input(images, self.model))
            copies = HostCopy(mean.float()), None if std is None else HostCopy(std.float())
        return lambda: (copies[0].wait(), None if copies[1] is None else copies[1].wait())

    def encode(self, images: torch.Tensor) -> Latents:
        """Return the latents of images, see `LatentCodec`."""
        return self.start(images)()

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Return one image per latent of [B, C, h, w]."""
        return self.images_of(pixels_ahead(self.pixels(latents)))

    @property
    def can_tile(self) -> bool:
        """Whether `tiled_pixels` gives anything: not of a kind of model nobody has cut."""
        return False

    def tiled_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what the model decodes [B, C, h, w] to, a tile at a time."""
        raise NotImplementedError

    def pixels(self, latents: torch.Tensor, *, is_tiled: bool = False) -> torch.Tensor:
        """Return [B, 3, H, W] in [-1, 1], see `LatentCodec`."""
        import torch

        with torch.inference_mode(), self._compiled_calls():
            latents = latents.to(self.model.device, self.model.dtype)
            return self.tiled_pixels(latents) if is_tiled else self.model.decode(latents).sample

    def decoding_bytes(self, shape: Sequence[int], *, is_tiled: bool = False) -> int:
        """Return the bytes that decoding takes, see `LatentCodec`: of a codec without values, which has the shapes."""
        import torch

        from encoders.living_bytes import LivingBytes, fused_attention

        blank = type(self).blank(self.model.config, dtype=self.model.dtype)
        if self.model.device.type == "cuda":
            blank.adapt_to_gpu()
        latents = torch.empty(*shape, dtype=self.model.dtype, device="meta")
        meter = LivingBytes()
        with fused_attention(), meter.watching(ignored=[latents, *blank.model.parameters()]):
            pixels_ahead(blank.pixels(latents, is_tiled=is_tiled))
        return meter.peak_bytes

    def images_of(self, pixels: SentAhead) -> list[Image.Image]:
        """Return the images of pixels on their way, see `LatentCodec`."""
        from PIL import Image

        levels, is_finite = pixels.wait()
        if not is_finite.all():
            fault = f"the weights of {self.origin} are at fault, put them there anew"
            image = int(is_finite.int().argmin())
            raise NonFinitePixelsError(f"the VAE gave pixels that are not finite: {fault}", image=image)
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in levels]


def require_vae_dtype(dtype: str) -> None:
    """Refuse a compute dtype in which codecs overflow.

    Raises:
        ValueError: names the dtype and those that there are; a field of a config adds its key.
    """
    if dtype not in VAE_DTYPES:
        reason = ": the VAE overflows float16 and gives black images" if dtype == "float16" else ""
        raise ValueError(f"vae_dtype {dtype} is not one of {', '.join(VAE_DTYPES)}{reason}")


def require_whole_patches(pixels: int, spec: LatentSpec, *, patch_size: int, key: str) -> None:
    """Check that a side of an image is a whole number of patches, each of `patch_size` latents a side.

    Raises:
        UserError: it is not; names `key` and both numbers.
    """
    multiple = spec.factor * patch_size
    if pixels < multiple or pixels % multiple:
        raise UserError(
            f"{key} {pixels} is not a multiple of {multiple} (VAE factor {spec.factor} times patch size {patch_size})"
        )


def to_model_input(images: torch.Tensor, model: Any) -> torch.Tensor:
    """Return images [B, 3, H, W], uint8 or in [-1, 1], in [-1, 1] on the model's device and in its dtype."""
    import torch

    if images.dtype == torch.uint8:
        images = to_device(images, model.device).to(torch.float32) / 127.5 - 1.0
    return images.to(model.device, model.dtype)


@dataclass(frozen=True, kw_only=True)
class SentAhead:
    """Tensors on their way from a device to the CPU.

    Attributes:
        tensors: on the CPU.
        arrived: event of a GPU behind which they are there; None where they are.
    """

    tensors: tuple[torch.Tensor, ...]
    arrived: torch.cuda.Event | None

    @property
    def is_there(self) -> bool:
        """Whether `wait` would return at once."""
        return self.arrived is None or self.arrived.query()

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors once they are there, whatever the device has to do after them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def send_ahead(*tensors: torch.Tensor) -> SentAhead:
    """Send tensors of one device to the CPU, without waiting for it."""
    import torch

    if not tensors[0].is_cuda:
        return SentAhead(tensors=tensors, arrived=None)
    # a copy that is not waited for needs memory that stays where it is
    targets = tuple(torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in tensors)
    for target, part in zip(targets, tensors, strict=True):
        target.copy_(part, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return SentAhead(tensors=targets, arrived=arrived)


def pixels_ahead(pixels: torch.Tensor) -> SentAhead:
    """Send what a decoder gives [B, 3, H, W] in [-1, 1]: as uint8, and beside it whether each image is finite [B]."""
    import torch

    levels = ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return send_ahead(levels, pixels.isfinite().flatten(1).all(1))

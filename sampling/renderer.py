"""The models at work: noise to latents, latents to images."""

# B images, L text tokens, D text width, C latent channels, h x w latent size

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image
from torch import Tensor, nn

from encoders.compilation import can_compile
from encoders.devices import choose_device, choose_dtype
from encoders.int8_weights import round_weights
from encoders.latents import LatentCodec, NonFinitePixelsError, SentAhead, pixels_ahead, send_ahead
from encoders.opening import open_codec
from encoders.vae_precision import open_in_bfloat16_if_it_holds
from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.engine.progress import get_logger
from pipelines.store.manifest import require_same
from pixart.block import blocks_of
from pixart.compilation import compile_blocks
from pixart.control import Control
from pixart.dit import DiT
from pixart.drawing.denoise import (
    NonFiniteLatentsError,
    Predict,
    denoise,
    draw_noise,
    make_generators,
    require_finite,
)
from pixart.drawing.graphs import PassGraphs
from pixart.drawing.guidance import GuidedNetwork, network_of_labels, network_of_texts
from pixart.drawing.passes import Pass
from pixart.model import PixArt
from pixart.processes.make import process_of
from sampling.config import SamplingConfig
from sampling.control_latents import ControlLatents, ControlPictures
from sampling.requests import ImageRequest
from sampling.text_encoding import text_id
from sampling.trained_model import TrainedModel

# Decoded at once: one image of 1024px takes the VAE 4 GB, more than a batch takes the transformer.
MAX_DECODED_PIXELS = 1024 * 1024
# Of the free memory, what decoding may be reckoned to take before it is done a tile at a time.
WHOLE_SHARE = 0.7

# Texts of compiled passes are padded to the most tokens there can be, and those to a multiple that kernels like: passes
# of one shape are compiled and captured once, whatever the prompts.
TOKENS_MULTIPLE = 8
Shape = tuple[int, int, int]  # images of a batch, their height and width in pixels

log = get_logger("sampling")


def fits_whole(num_bytes: int, *, free_bytes: int) -> bool:
    """Whether images are decoded whole that take so many bytes: kernels want memory of their own, too."""
    return num_bytes <= WHOLE_SHARE * free_bytes


def _free_bytes(device: torch.device) -> int:
    """Return what of a GPU is free, or held by torch for what comes."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _name(request: ImageRequest) -> str:
    return f"{request.file} (seed {request.seed})"


def round_blocks(
    model: PixArt | DiT, config: SamplingConfig, *, device: torch.device, dtype: torch.dtype
) -> PixArt | DiT:
    """Move a transformer to a device in `dtype`, with the weights of its blocks in 8 bits if the recipe says so."""
    if config.weight_dtype == "int8":
        # Of its blocks alone, and their copies in a control branch: what is beside them is a thirtieth of the weights,
        # and turns times into shifts and scales that all tokens share.
        round_weights(nn.ModuleList(blocks_of(model.to(dtype))), device=device)
    return model.to(device, dtype)


class Drawing:
    """Images of a batch on their way from the device."""

    def __init__(
        self,
        requests: Sequence[ImageRequest],
        parts: Sequence[SentAhead],
        is_finite: SentAhead,
        *,
        codec: LatentCodec,
        blame: str,
    ) -> None:
        self._requests, self._parts, self._is_finite = requests, parts, is_finite
        self._codec, self._blame = codec, blame

    @property
    def is_there(self) -> bool:
        """Whether `images` would not wait."""
        return all(part.is_there for part in self._parts)

    def images(self) -> list[Image.Image]:
        """Return one image per request, once the device has drawn them.

        Raises:
            UserError: latents or pixels are not finite; names the image and what finds weights that are damaged.
        """
        try:
            require_finite(*self._is_finite.wait())
        except NonFiniteLatentsError as error:
            raise UserError(f"{_name(self._requests[error.image])}: {error}: {self._blame}") from None
        images: list[Image.Image] = []
        for part in self._parts:
            try:
                images += self._codec.images_of(part)
            except NonFinitePixelsError as error:
                raise UserError(f"{_name(self._requests[len(images) + error.image])}: {error}") from None
        return images


class Renderer:
    """A checkpoint's transformer and VAE on their device, ready to draw batches of images of one size.

    Passes of batches of `compiled_shapes` are compiled, and on a GPU captured in CUDA graphs; if there are any,
    `compiles_decoder` compiles the VAE's decoder on a GPU, for all shapes.

    Attributes:
        computed_in: the dtypes of transformer and VAE.

    Raises:
        UserError: the VAE's scaling is not the one that the transformer was trained with.
    """

    def __init__(
        self,
        config: SamplingConfig,
        trained: TrainedModel,
        *,
        compiled_shapes: Collection[Shape] = (),
        compiles_decoder: bool = False,
    ) -> None:
        self.config = config
        self.trained = trained
        torch.set_num_threads(config.num_threads or torch.get_num_threads())
        self.device = self._choose_device()
        dtype = choose_dtype(config.dtype, self.device)
        self.model = self._load_model(dtype)
        self.codec, vae_dtype = self._open_codec()
        self.computed_in = {"dtype": str(dtype).removeprefix("torch."), "vae_dtype": vae_dtype}
        self.compiled_shapes = frozenset(compiled_shapes)
        if self.compiled_shapes:
            compile_blocks(self.model)
        # After the test of its dtype, which opens two: they would be compiled for one picture. On a CPU bytes stay.
        if self.compiled_shapes and compiles_decoder and can_compile(self.device):
            self.codec.compile_decoder()
        self._graphs, self._has_warned = PassGraphs(), False
        self._take_controls()
        self._decoding_bytes: dict[tuple[int, ...], int] = {}  # by the shape of latents

    def change_transformer(self, config: SamplingConfig, trained: TrainedModel) -> None:
        """Draw with other adapters or weights of another dtype from now on; the VAE stays where it is.

        The transformer that is there goes before the other one is read, as both may not fit; if that fails, none is.
        """
        dtype = self.model.final.weight.dtype
        del self.model
        self._graphs = PassGraphs()
        self.config, self.trained = config, trained
        self._take_controls()
        self.model = self._load_model(dtype)
        if self.compiled_shapes:
            compile_blocks(self.model)

    def _take_controls(self) -> None:
        """Begin to keep what leads images through the branch of the weights."""
        self._pictures = ControlPictures(self.trained, device=self.device)
        self._control = ControlLatents(self._pictures, self.codec, device=self.device)

    def _choose_device(self) -> torch.device:
        return choose_device(self.config.device, key="sampling.device")

    def _load_model(self, dtype: torch.dtype) -> PixArt | DiT:
        return round_blocks(self.trained.load(), self.config, device=self.device, dtype=dtype)

    def _open_codec(self) -> tuple[LatentCodec, str]:
        trained, dtype = self.trained, self.config.vae_dtype
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "tested"

        def opened(dtype: str) -> LatentCodec:
            key, vae = f"VAE of {trained.name}", trained.vae
            return open_codec(vae["model"], vae["revision"], device=self.device, dtype=dtype, key=key)

        if dtype == "tested":
            codec, dtype = open_in_bfloat16_if_it_holds(opened)
            log.info(f"the VAE decodes in {dtype}, as a test picture says")
        else:
            codec = opened(dtype)
        spec = codec.spec
        for name, found in (("scaling_factor", spec.scale), ("shift_factor", spec.shift)):
            require_same(
                name,
                trained.vae.get(name, found),
                found,
                where=f"VAE {trained.vae['model']}",
                mend=f"{trained.name} was trained with another VAE than lies there now: put that one back",
            )
        if self.config.vae_tiles is True and not codec.can_tile:
            raise UserError(
                f"sampling.vae_tiles = true: the VAE {trained.vae['model']} is not made of blocks that can be decoded "
                "a tile at a time; leave it at 'auto'"
            )
        return codec, dtype

    @torch.inference_mode()
    def draw(
        self,
        requests: Sequence[ImageRequest],
        texts: Mapping[str, Tensor],
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> Drawing:
        """Draw one image per request; all are of one size, led by an image or not, and none depends on the others.

        A GPU is given all its work and not waited for, but by `on_step`, which is told how many solver steps are done.
        `texts` are the embeddings [L, D] of their prompts and of the negative prompt (none for a DiT).
        """
        height, width = requests[0].height, requests[0].width
        spec = self.codec.spec
        shape = (spec.channels, height // spec.factor, width // spec.factor)
        generators = make_generators([request.seed for request in requests])
        process = process_of(self.trained.process)
        scheduler = process.scheduler(self.config.solver, self.config.num_steps, times=self.config.times)
        noise = draw_noise(generators, shape).to(self.device)  # [B, C, h, w]
        is_compiled = (len(requests), height, width) in self.compiled_shapes
        scale = self.trained.pass_guidance(self.config.guidance_scale)
        passes = self.config.passes(scheduler.timesteps, process.num_times, scale=scale)
        network = self._network(requests, texts, passes=passes, is_compiled=is_compiled)
        with self._compiling(is_compiled):
            predict: Predict = self._graphs.capture(network, noise) if is_compiled else network
            latents, is_finite = denoise(predict, noise, scheduler, generators=generators, on_step=on_step)
        self._warn_of_failure()
        sent = send_ahead(is_finite)
        num_at_once = max(1, MAX_DECODED_PIXELS // (height * width))
        unscaled = latents / spec.scale + spec.shift
        parts = [
            pixels_ahead(self.codec.pixels(part, is_tiled=self._is_tiled(part.shape)))
            for part in unscaled.split(num_at_once)
        ]
        return Drawing(requests, parts, sent, codec=self.codec, blame=self._blame())

    def _compiling(self, is_compiled: bool) -> AbstractContextManager[object]:
        """Let blocks that are compiled for other shapes run as they are written."""
        if is_compiled or not self.compiled_shapes:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _is_tiled(self, shape: Sequence[int]) -> bool:
        """Whether latents of this shape are decoded a tile at a time."""
        if self.config.vae_tiles != "auto":
            return self.config.vae_tiles
        if self.device.type != "cuda" or not self.codec.can_tile:
            return False
        if tuple(shape) not in self._decoding_bytes:
            self._decoding_bytes[tuple(shape)] = self.codec.decoding_bytes(shape)
        return not fits_whole(self._decoding_bytes[tuple(shape)], free_bytes=_free_bytes(self.device))

    def _warn_of_failure(self) -> None:
        if self._graphs.failure is not None and not self._has_warned:
            log.warning(f"passes are not captured in CUDA graphs, but computed: {self._graphs.failure}")
            self._has_warned = True

    def _blame(self) -> str:
        """Return what to do about a model that gives nothing finite."""
        weights, dtype = self.trained.model_path, str(self.model.final.weight.dtype).removeprefix("torch.")
        other = "" if dtype == "float32" else f"; if they are sound, set sampling.dtype = 'float32', it is {dtype} now"
        if self.trained.run is None:
            return f"the weights of {weights} are at fault, put them there anew{other}"
        command = typed_command("verify", {"run": self.trained.run})
        return f"`{command}` finds weights that are damaged in {weights}{other}"

    @torch.inference_mode()
    def _network(
        self,
        requests: Sequence[ImageRequest],
        texts: Mapping[str, Tensor],
        *,
        passes: Sequence[Pass],
        is_compiled: bool,
    ) -> GuidedNetwork:
        scale = self.trained.pass_guidance(self.config.guidance_scale)
        if self.model.kind == "dit":
            labels = [request.label for request in requests if request.label is not None]
            return network_of_labels(self.model, labels, passes=passes, guidance_scale=scale)
        conditions = [texts[text_id(request, self.config)] for request in requests]
        width = self.model.config.caption_channels
        if conditions[0].shape[-1] != width:
            raise UserError(
                f"embeddings are {conditions[0].shape[-1]} wide, but {self.trained.name} reads {width}: they are of "
                f"another text encoder (sampling.text_embeddings {self.config.text_embeddings})"
            )
        return network_of_texts(
            self.model,
            conditions,
            texts[self.config.negative_prompt],
            passes=passes,
            guidance_scale=scale,
            size_pixels=(requests[0].height, requests[0].width),
            min_tokens=self._most_tokens() if is_compiled else 0,
            control=None if requests[0].control is None else self._lead(requests),
        )

    def _lead(self, requests: Sequence[ImageRequest]) -> Control:
        """Return the control images of a batch as the network sees them."""
        latents = self._control.of(requests, are_photos=self.config.control_is == "photo")
        return Control(latents, self.config.control_strength)

    def control_picture(self, request: ImageRequest) -> Image.Image:
        """Return the map that leads a request's image."""
        return self._pictures.of(request, is_photo=self.config.control_is == "photo")

    def _most_tokens(self) -> int:
        assert self.trained.text is not None
        return -(-self.trained.text["max_tokens"] // TOKENS_MULTIPLE) * TOKENS_MULTIPLE

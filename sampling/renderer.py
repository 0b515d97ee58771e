"""The models at work: noise to latents, latents to images."""

# B images, L text tokens, D text width, C latent channels, h x w latent size

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from encoders.devices import choose_device, choose_dtype
from encoders.latents import NonFinitePixelsError
from encoders.opening import open_codec
from errors import UserError, run_argument
from pipelines.store.manifest import require_same
from pixart.drawing.denoise import NonFiniteLatentsError, denoise, draw_noise, make_generators, require_finite
from pixart.drawing.guidance import GuidedNetwork, network_of_labels, network_of_texts
from pixart.drawing.passes import Pass
from pixart.processes.make import process_of
from sampling.config import SamplingConfig
from sampling.requests import ImageRequest
from sampling.text_encoding import text_id
from sampling.trained_model import TrainedModel

# Decoded at once: one image of 1024px takes the VAE 4 GB, more than a batch takes the transformer.
MAX_DECODED_PIXELS = 1024 * 1024


def _name(request: ImageRequest) -> str:
    return f"{request.file} (seed {request.seed})"


class Renderer:
    """A checkpoint's transformer and VAE on their device, ready to draw batches of images of one size.

    Raises:
        UserError: the VAE's scaling is not the one that the transformer was trained with.
    """

    def __init__(self, config: SamplingConfig, trained: TrainedModel) -> None:
        self.config = config
        self.trained = trained
        torch.set_num_threads(config.num_threads or torch.get_num_threads())
        self.device = choose_device(config.device, key="sampling.device")
        self.model = trained.load().to(self.device, choose_dtype(config.dtype, self.device))
        self.codec = open_codec(
            trained.vae["model"], trained.vae["revision"], device=self.device, key=f"VAE of {trained.name}"
        )
        spec = self.codec.spec
        for name, found in (("scaling_factor", spec.scale), ("shift_factor", spec.shift)):
            require_same(
                name,
                trained.vae.get(name, found),
                found,
                where=f"VAE {trained.vae['model']}",
                mend=f"{trained.name} was trained with another VAE than lies there now: put that one back",
            )

    def draw(
        self,
        requests: Sequence[ImageRequest],
        texts: Mapping[str, Tensor],
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Return one image per request; all are of one size, and none depends on the others.

        `texts` are the embeddings [L, D] of their prompts and of the negative prompt (none for a DiT); `on_step` is
        told how many solver steps are done.

        Raises:
            UserError: latents or pixels are not finite; names the image and what finds weights that are damaged.
        """
        height, width = requests[0].height, requests[0].width
        spec = self.codec.spec
        shape = (spec.channels, height // spec.factor, width // spec.factor)
        generators = make_generators([request.seed for request in requests])
        process = process_of(self.trained.process)
        scheduler = process.scheduler(self.config.solver, self.config.num_steps)
        noise = draw_noise(generators, shape).to(self.device)  # [B, C, h, w]
        network = self._network(requests, texts, passes=self.config.passes(scheduler.timesteps, process.num_times))
        try:
            latents, is_finite = denoise(network, noise, scheduler, generators=generators, on_step=on_step)
            require_finite(is_finite)
        except NonFiniteLatentsError as error:
            raise UserError(f"{_name(requests[error.image])}: {error}: {self._blame()}") from None
        return self._decode(latents / spec.scale + spec.shift, requests)

    def _decode(self, latents: Tensor, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        num_at_once = max(1, MAX_DECODED_PIXELS // (requests[0].height * requests[0].width))
        images: list[Image.Image] = []
        for part in latents.split(num_at_once):
            try:
                images += self.codec.decode(part)
            except NonFinitePixelsError as error:
                raise UserError(f"{_name(requests[len(images) + error.image])}: {error}") from None
        return images

    def _blame(self) -> str:
        """Return what to do about a model that gives nothing finite."""
        weights, dtype = self.trained.model_path, str(self.model.final.weight.dtype).removeprefix("torch.")
        other = "" if dtype == "float32" else f"; if they are sound, set sampling.dtype = 'float32', it is {dtype} now"
        if self.trained.run is None:
            return f"the weights of {weights} are at fault, put them there anew{other}"
        return f"`make verify {run_argument(self.trained.run)}` finds weights that are damaged in {weights}{other}"

    @torch.inference_mode()
    def _network(
        self, requests: Sequence[ImageRequest], texts: Mapping[str, Tensor], *, passes: Sequence[Pass]
    ) -> GuidedNetwork:
        scale = self.config.guidance_scale
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
        )

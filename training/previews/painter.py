"""One rank's work on the previews of a step: the average as a network of its own, noise to latents, latents to images.

Transformer and VAE are on the device one after the other, and an image at a time: while nothing of a step is in memory
but weights and optimizer, this takes less than the step.
"""

# C latent channels, h x w latent size

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from encoders.latents import pixels_ahead
from encoders.opening import open_codec
from pipelines.store.manifest import require_same
from pixart.control import Control
from pixart.dit import DiT
from pixart.drawing.denoise import denoise, draw_noise, make_generators, require_finite
from pixart.drawing.guidance import GuidedNetwork, network_of_labels, network_of_texts
from pixart.drawing.passes import plan_passes
from pixart.guidance_condition import fold_guidance
from pixart.model import PixArt
from pixart.processes.make import process_of
from training.previews.plan import PreviewPlan, preview_drawing
from training.stages.stage import TrainingJob


class Painter:
    """Draws the images of a plan with one network, and then decodes them.

    Args:
        job: says of which process and codec the network is.
        plan: what is drawn.
        texts: embeddings [L, D] of the null caption and of each prompt; empty for a DiT.
        network: without values of its own, on the meta device.
        weights: all of them by name, on whatever device and in whatever precision; they are not changed, and what is
            on `device` in `dtype` already is not copied.
        device, dtype: where and in what the network computes.
        controls: latents [1, C, h, w] that lead each image; empty where nothing does.
    """

    def __init__(
        self,
        job: TrainingJob,
        plan: PreviewPlan,
        texts: Sequence[Tensor],
        *,
        network: DiT | PixArt,
        weights: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        controls: Sequence[Tensor] = (),
    ) -> None:
        self._controls = controls
        self._job, self._plan, self._texts, self._device = job, plan, texts, device
        network.load_state_dict(weights, assign=True)
        self._drawing = preview_drawing(job.settings)
        if self._drawing.told_guidance is not None and network.kind == "pixart":
            network = fold_guidance(network, self._drawing.told_guidance)
        self._network: DiT | PixArt | None = network.to(device, dtype).eval().requires_grad_(False)
        self._latents: list[Tensor] = []

    def draw(self, number: int) -> None:
        """Draw the latents of one image of the plan.

        Raises:
            NonFiniteLatentsError: they are not finite.
        """
        latents, is_finite = self.denoise(number)
        require_finite(is_finite)
        self._latents.append(latents.cpu())

    @torch.inference_mode()
    def denoise(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the unscaled latents [1, C, h, w] of one image of the plan, and whether they are finite."""
        network, settings, vae, drawing = self._network, self._job.settings, self._job.features.vae, self._drawing
        assert network is not None, "all are drawn before the first is decoded"
        process = process_of(settings.process_spec)
        scheduler = process.scheduler(drawing.solver, drawing.num_steps, times=drawing.times)
        times = [float(time) / process.num_times for time in scheduler.timesteps]
        side = self._plan.downsample
        shape = (network.config.in_channels, self._plan.height // side, self._plan.width // side)
        generators = make_generators([settings.preview_seed])
        noise = draw_noise(generators, shape).to(self._device)
        guided = self._conditioned(network, number, times)
        latents, is_finite = denoise(guided, noise, scheduler, generators=generators)
        return latents / vae["scaling_factor"] + vae.get("shift_factor", 0.0), is_finite

    def _conditioned(self, network: DiT | PixArt, number: int, times: Sequence[float]) -> GuidedNetwork:
        scale = self._drawing.guidance_scale
        passes = plan_passes(times, guidance_scale=scale)
        if network.kind == "dit":
            return network_of_labels(network, [self._plan.labels[number]], passes=passes, guidance_scale=scale)
        return network_of_texts(
            network,
            [self._texts[1 + number]],
            self._texts[0],
            passes=passes,
            guidance_scale=scale,
            size_pixels=(self._plan.height, self._plan.width),
            control=Control(self._controls[number]) if self._controls else None,
        )

    def decode(self) -> list[Image.Image]:
        """Return the images of all that was drawn; the network is gone then, and so is the VAE.

        Raises:
            UserError: the VAE is not there any more, is another one, or gives no finite pixels.
        """
        self._network = None
        vae = self._job.features.vae
        codec = open_codec(vae["model"], vae["revision"], device=self._device, key="VAE of the features")
        for name, found in (("scaling_factor", codec.spec.scale), ("shift_factor", codec.spec.shift)):
            mend = "the features were made with another VAE than lies there now: put that one back"
            require_same(name, vae.get(name, found), found, where=f"VAE {vae['model']}", mend=mend)
        # By tiles a GPU decodes the same pixels, but for rounding, in half of the memory.
        is_tiled = self._device.type == "cuda" and codec.can_tile
        pixels = (codec.pixels(latents, is_tiled=is_tiled) for latents in self._latents)
        return [image for part in pixels for image in codec.images_of(pixels_ahead(part))]

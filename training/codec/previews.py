"""Previews of a codec: some crops, each beside what the average of the weights makes of it."""

# H x W pixels

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from pipelines.store.previews import Pictures, write_previews
from training.codec.autoencoder import Autoencoder
from training.codec.statistics import stage_crops
from training.loop.networks import Networks
from training.loop.schedule import is_due
from training.objectives.reconstruction import levels
from training.previews.page import write_page
from training.previews.previews import Failures, last_previewed
from training.stages.critics import critic_of, without_critic
from training.stages.kinds import Trainee
from training.stages.stage import TrainingJob


class CodecPreviews:
    """Draws crops [3, H, W] and what the average decodes of their latents' means, side by side.

    Args:
        job: what is trained.
        crops: what is drawn; rank 0 alone has them.
        blank: the codec on the meta device.
        last_step: whose previews are there.
    """

    def __init__(self, job: TrainingJob, crops: Sequence[Tensor], *, blank: Autoencoder, last_step: int | None) -> None:
        self._job, self._crops, self._blank, self._last_step = job, crops, blank, last_step

    def is_due(self, step: int) -> bool:
        """Whether previews of this step are wanted and not there."""
        settings = self._job.settings
        every = settings.preview_every or settings.checkpoint_every
        return step != self._last_step and is_due(step, every=every, last=settings.num_steps)

    def draw(self, networks: Networks, *, step: int) -> Pictures:
        """Draw and write the previews of a step, and return them on rank 0; all ranks must call it."""
        self._last_step = step
        average = networks.ema.gather()
        pictures: Pictures = []
        with networks.model.whole_frozen() as frozen:
            if dist.get_rank() == 0:
                with Failures(self._job, step):
                    pictures = self._drawn(frozen | average, device=networks.model.device)
                    write_previews(self._job.directory, step, pictures)
                    write_page(self._job.directory)
        dist.barrier()
        return pictures

    @torch.no_grad()
    def _drawn(self, weights: dict[str, Tensor], *, device: torch.device) -> Pictures:
        network = copy.deepcopy(self._blank)
        if critic_of(network) is not None:
            del network.critic
        network.load_state_dict(without_critic(weights), assign=True)
        network.to(device, torch.float32).eval()
        pictures = []
        for number, crop in enumerate(self._crops):
            images = levels(crop[None].to(device))  # [1, 3, H, W]
            decoded = network(images, images.new_zeros(network.latent_shape(images.shape))).images
            both = torch.cat([images, decoded], dim=3)[0]  # [3, H, 2W]
            pixels = ((both.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            pictures.append((f"crop {number}", Image.fromarray(pixels)))
        return pictures


def open_codec_previews(job: TrainingJob, *, blank: Trainee) -> CodecPreviews | None:
    """Return what draws a codec's previews, None if it draws none; all ranks must call it.

    The crops are the first that are held out, or else that it is trained on. `blank` is the network that trains, on the
    meta device.
    """
    number = job.settings.preview_crops
    if not number:
        return None
    assert isinstance(blank, Autoencoder), "the settings refuse others"
    last_step = last_previewed(job)
    crops: list[Tensor] = []
    if dist.get_rank() == 0:
        crops = [
            crop for batch in stage_crops(job.features.held_out or job.features.datasets, number) for crop in batch
        ]
    return CodecPreviews(job, crops, blank=blank, last_step=last_step)

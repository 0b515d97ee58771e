"""What previews take of a rank's memory: reckoned by shapes, as a step is, of the image that they draw.

They are drawn between steps, when weights, masters, moments and average are there and gradients are not.
"""

import copy
import dataclasses
from collections.abc import Mapping

import torch

from encoders.living_bytes import LivingBytes, fused_attention, storage_bytes
from encoders.opening import blank_codec
from pixart.dit import DiT
from pixart.model import PixArt
from training.launch.reckoning import FP32, MAX_ZERO_STAGE
from training.previews.painter import Painter
from training.previews.plan import PreviewPlan
from training.stages.stage import TrainingJob

META = torch.device("meta")
# Of a preview's steps: enough for all that the solver keeps of former ones.
NUM_STEPS = 4


def preview_parts(
    job: TrainingJob, plan: PreviewPlan, network: DiT | PixArt, *, dtype: torch.dtype, is_host: bool
) -> dict[str, int]:
    """Return the bytes that drawing or decoding takes, whichever takes more, by what they are for.

    Args:
        job: of which the plan is.
        plan: what is drawn.
        network: that is trained, on the meta device; of the copy that draws, weights that do not train are its own.
        dtype: that it computes in.
        is_host: whether it is the machine's memory, in which the average lies whole, too; a GPU decodes by tiles.
    """
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    # On the CPU in fp32 the network draws with the whole average itself.
    copied = 0 if is_host and dtype == torch.float32 else trained * dtype.itemsize
    gathered = {"whole average": trained * FP32} if is_host else {}
    if job.settings.zero_stage == MAX_ZERO_STAGE:
        frozen = sum(weight.numel() for weight in network.parameters() if not weight.requires_grad)
        gathered["whole frozen weights"] = frozen * dtype.itemsize
    drawing = {"network of previews": copied, "drawing a preview": drawing_bytes(job, plan, network, dtype=dtype)}
    vae, decoding = decoding_bytes(job, plan, channels=network.config.in_channels, is_host=is_host)
    moments = [drawing, {"VAE": vae, "decoding a preview": decoding}]
    return gathered | max(moments, key=lambda parts: sum(parts.values()))


def drawing_bytes(job: TrainingJob, plan: PreviewPlan, network: DiT | PixArt, *, dtype: torch.dtype) -> int:
    """Return what denoising one image takes beside the network that draws it."""
    few = min(job.settings.preview_num_steps, NUM_STEPS)
    short = dataclasses.replace(job, settings=job.settings.model_copy(update={"preview_num_steps": few}))
    text = None if plan.labels else job.features.text_encoder
    # On the CPU, as embeddings are.
    texts = [] if text is None else [torch.zeros(text["max_tokens"], text["d_text"])] * (1 + len(plan.names))
    weights = {name: torch.empty_like(weight, dtype=dtype) for name, weight in network.named_parameters()}
    sides = (1, network.config.in_channels, plan.height // plan.downsample, plan.width // plan.downsample)
    controls = [torch.zeros(sides)] * len(plan.names) if job.settings.preview_controls else []
    painter = Painter(
        short,
        plan,
        texts,
        network=copy.deepcopy(network),
        weights=weights,
        device=META,
        dtype=dtype,
        controls=controls,
    )
    meter = LivingBytes(device="meta")
    with fused_attention(), meter.watching(ignored=weights.values()):
        painter.denoise(0)
    return meter.peak_bytes


def decoding_bytes(job: TrainingJob, plan: PreviewPlan, *, channels: int, is_host: bool) -> tuple[int, int]:
    """Return the bytes of the VAE, and what decoding one image takes beside it."""
    vae: Mapping = job.features.vae
    codec = blank_codec(vae["model"], vae["revision"], dtype="float32", key="VAE of the features")
    shape = (1, channels, plan.height // plan.downsample, plan.width // plan.downsample)
    decoding = codec.decoding_bytes(shape, is_tiled=not is_host and codec.can_tile)
    return storage_bytes(codec.model.parameters()), decoding

"""Control images that lead previews: looked at before a stage starts, and encoded when they are first drawn."""

# C latent channels, h x w latent size

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_path
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject, decode_image, plan_crop, resize_and_crop
from pipelines.recipe import DataConfig
from training.previews.plan import PreviewPlan
from training.stages.stage import TrainingJob

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = get_logger("training")

MAX_PIXELS: int = DataConfig.model_fields["max_pixels"].default


def require_controls(job: TrainingJob, plan: PreviewPlan | None) -> None:
    """Look at the images that lead previews: there is one for each prompt, and each is an image.

    `plan` is None of a stage that draws none.

    Raises:
        MissingFileError, UserError: names the recipe key and the file.
    """
    key, paths = _key(job), control_paths(job)
    if not job.settings.has_control:
        if paths:
            raise UserError(f"{key} leads the previews of a stage that trains = 'control', and this one's is another")
        return
    if not paths and plan is not None:
        log.warning(f"{key} names no images: previews are drawn without control, and show nothing of the branch")
    num_prompts = 0 if plan is None else len(plan.names)
    if paths and len(paths) != num_prompts:
        raise UserError(f"{key} has {len(paths)} images for {num_prompts} preview_prompts: give as many")
    for path in paths:
        if not path.is_file():
            raise MissingFileError(f"{key} {path} does not exist, or is no file")
        assert plan is not None, "there are as many prompts"
        _cut(path, plan, key=key)


def control_paths(job: TrainingJob) -> list[Path]:
    """Return the files that lead previews."""
    run = str(job.command.run)
    return [typed_path(path.replace("{run}", run)) for path in job.settings.preview_controls]


def encode_controls(job: TrainingJob, plan: PreviewPlan, *, device: torch.device) -> Sequence[Tensor]:
    """Return the images as the network knows latents, fp32 [1, C, h, w] each on the CPU; none where none leads.

    Raises:
        MissingFileError, UserError: the VAE is not there any more, or a file is no image any more.
    """
    paths = control_paths(job) if job.settings.has_control else []
    if not paths:
        return []
    import torch

    from encoders.opening import open_codec

    vae = job.features.vae
    codec = open_codec(vae["model"], vae["revision"], device=device, key="VAE of the features")
    latents = []
    for path in paths:
        pixels = torch.from_numpy(_cut(path, plan, key=_key(job))).permute(2, 0, 1)[None]  # [1, 3, H, W]
        mean, _ = codec.encode(pixels)
        latents.append((mean.float().cpu() - vae.get("shift_factor", 0.0)) * vae["scaling_factor"])
    return latents


def _cut(path: Path, plan: PreviewPlan, *, key: str) -> np.ndarray:
    """Return an image cut to the size of previews, as features cut images, uint8 [H, W, 3]."""
    try:
        image = decode_image(path.read_bytes(), max_pixels=MAX_PIXELS)
        plan_crop(image.width, image.height, plan.width, plan.height, max_pixels=MAX_PIXELS)
        return np.array(resize_and_crop(image, plan.width, plan.height, max_pixels=MAX_PIXELS)[0])
    except SampleReject as reject:
        raise UserError(f"{key} {path} cannot lead a preview: {reject}") from None


def _key(job: TrainingJob) -> str:
    return f"training.{job.command.stage_name}.preview_controls"

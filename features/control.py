"""Families of control maps: what a control branch is shown of an image, through the same VAE and with the same crops.

`control-canny`, `control-hed` and `control-depth` are drawn of the cropped image, see `encoders/control_kinds.py`; maps
that people have already are `features/control_given.py`.
"""

# B batch, H W pixels

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from encoders.control_kinds import MAP_CLASSES, open_control_maps
from encoders.control_maps import ControlMaps, NetworkMaps
from encoders.devices import choose_device
from errors import UserError
from features.cropping import CutImage
from features.jobs import FamilyPlan, FeatureFamily, FeatureInputs, FeatureJob
from features.latent_worker import LatentWorker, LatentWorkerConfig
from features.latents import LATENTS, image_facts, image_job, plan_images
from pipelines.engine.preflight import require_packages
from pipelines.engine.progress import get_logger
from pipelines.store.manifest import Manifest

if TYPE_CHECKING:
    from torch import Tensor

# Of the name of a family of maps, before their kind.
PREFIX = "control-"
# Raised when a change of code changes what is drawn of unchanged images.
CODE_VERSION = 1

log = get_logger("features")


class MapWorker(LatentWorker):
    """Encodes maps of images: those of a network a batch at a time, on the codec's device, others in threads."""

    def __init__(self, config: LatentWorkerConfig) -> None:
        super().__init__(config)
        device = choose_device(config.device, key="features.device")
        kind, settings = config.family.removeprefix(PREFIX), config.settings.model_dump()
        self._maps = open_control_maps(kind, settings, device=device, key=f"families.{config.family}")

    def depict(self, image: CutImage) -> np.ndarray:
        """Return the map of an image; the image itself where a network will see it with others."""
        return image.pixels if isinstance(self._maps, NetworkMaps) else self._maps.draw(image.pixels)

    def depict_batch(self, pictures: Tensor) -> Tensor:
        """Return what a network draws of images."""
        return self._maps.draw_batch(pictures) if isinstance(self._maps, NetworkMaps) else pictures


def settings_key(inputs: FeatureInputs, family: FeatureFamily) -> str:
    """Return the key of a family's own table, to begin messages with."""
    return f"features.{inputs.stage_name}.families.{family.name}"


def require_own_crops(inputs: FeatureInputs, family: FeatureFamily) -> None:
    """Refuse maps beside imported latents, whose images were cropped by other code.

    Raises:
        UserError: names both keys.
    """
    if inputs.features.latents_from is not None:
        raise UserError(
            f"{settings_key(inputs, family)}: maps are cropped as images are here, and those of "
            f"features.{inputs.stage_name}.latents_from = {inputs.features.latents_from!r} were cropped elsewhere: "
            "encode the images, too"
        )


def control_facts(
    job: FeatureJob, inputs: FeatureInputs, *, kind: str, settings: Mapping[str, Any], identity: str | None
) -> dict[str, Any]:
    """Return what later stages need to know of maps: how they are drawn, beside what they do of latents.

    Args:
        job, inputs: of the family.
        kind: of the maps.
        settings: by which the same map is drawn of another image.
        identity: of the model that drew them, if one did.
    """
    control = {"kind": kind, "settings": dict(settings), "identity": identity}
    return {**image_facts(job, inputs), "control": control}


def report_maps(job: FeatureJob, manifest: Manifest, inputs: FeatureInputs) -> None:
    """Say where to look, and how well the VAE gives maps back: lines of a pixel are harder than images."""
    psnr_db = manifest.shards[job.sources[0].name].details.get("preview_psnr_db")
    if psnr_db is not None:
        path = job.worker_config.preview_path
        log.info(f"{path}: images, their maps, and what the VAE makes of those ({psnr_db:.1f} dB)")


def _drawn_family(maps: type[ControlMaps]) -> FeatureFamily:
    """Return the record of the family of the maps that a class draws."""

    def identity(inputs: FeatureInputs) -> str | None:
        return maps.identity(family.read_settings(inputs), key=settings_key(inputs, family))

    def make_job(inputs: FeatureInputs) -> FeatureJob:
        require_own_crops(inputs, family)
        decided = {"control_version": CODE_VERSION}
        model = identity(inputs)
        return image_job(
            inputs,
            family,
            worker_class=MapWorker,
            also_decided_by=decided if model is None else decided | {"control_model": model},
        )

    def plan(inputs: FeatureInputs) -> FamilyPlan:
        planned = plan_images(make_job(inputs), inputs)
        settings = family.read_settings(inputs).model_dump(exclude_none=True)
        drawn = ", ".join(f"{name} {value}" for name, value in settings.items())
        return replace(planned, basis=f"{maps.kind} ({drawn}); {planned.basis}")

    def facts(job: FeatureJob, inputs: FeatureInputs) -> dict[str, Any]:
        settings = family.read_settings(inputs).model_dump()
        return control_facts(job, inputs, kind=maps.kind, settings=settings, identity=identity(inputs))

    def check(job: FeatureJob, inputs: FeatureInputs) -> None:
        require_packages(*maps.packages)
        maps.require(family.read_settings(inputs), key=settings_key(inputs, family))

    family = replace(
        LATENTS,
        name=f"{PREFIX}{maps.kind}",
        is_wanted=lambda features: f"{PREFIX}{maps.kind}" in features.families,
        job=make_job,
        plan=plan,
        facts=facts,
        settings=maps.settings_class,
        check=check,
        report=report_maps,
    )
    return family


DRAWN_MAPS = tuple(map(_drawn_family, MAP_CLASSES))

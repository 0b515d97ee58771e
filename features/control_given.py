"""The family of control maps that people have already: one picture a sample, found by the sample's key.

They are found as imported features are, and cut as their images are.
"""

# H W pixels

from dataclasses import replace
from typing import Any

import numpy as np
import pydantic

from features.control import (
    CODE_VERSION,
    PREFIX,
    control_facts,
    report_maps,
    require_own_crops,
    settings_key,
)
from features.cropping import CutImage
from features.imported_files import FeaturePlaces, find_places, imported_sources
from features.jobs import FamilyPlan, FeatureInputs, FeatureJob
from features.latent_worker import LatentWorker
from features.latents import LATENTS, image_job, plan_images
from pipelines.raw.images import SampleReject, crop_as, decode_image
from pipelines.raw.samples import READABLE_EXTENSIONS
from pipelines.recipe import TableConfig

KIND = "given"
NAME = f"{PREFIX}{KIND}"
# What keeps a map as it was drawn is looked for first.
SUFFIXES = ("png", "webp", *sorted(READABLE_EXTENSIONS - {"png", "webp"}))
MISSING, OTHER_SHAPE = "missing_map", "map_of_other_shape"
# By which a map of another size may miss the shape of its image: sizes are whole numbers.
MAX_OFF_PIXELS = 2.0


class GivenSettings(TableConfig):
    """Where the maps are."""

    images: str = pydantic.Field(
        pattern=r"\S",
        description="Folder, pattern or tars of pictures that are called as their images are: a/b/7.png for a/b/7.jpg; "
        "{run} stands for the run's folder",
    )


class GivenMapWorker(LatentWorker):
    """Encodes the picture that a sample has beside its image."""

    def depict(self, image: CutImage) -> np.ndarray:
        """Return the picture beside an image, cut as that is.

        Raises:
            SampleReject: it cannot be decoded (`map:` and why), or has another shape.
        """
        try:
            picture = decode_image(image.beside, max_pixels=self.config.max_pixels)
        except SampleReject as reject:
            raise SampleReject(f"map:{reject.reason}", reject.detail) from None
        require_shape(picture.size, image.original)
        height, width = image.pixels.shape[:2]
        return np.array(crop_as(picture, image.crop, width, height))


def require_shape(size: tuple[int, int], original: tuple[int, int]) -> None:
    """Refuse a map whose shape is not that of its image, both (width, height), but for rounding to whole pixels.

    Raises:
        SampleReject: `map_of_other_shape`.
    """
    small, large = sorted((size, original), key=lambda sides: sides[0] * sides[1])
    off_width = abs(small[0] - small[1] * large[0] / large[1])
    off_height = abs(small[1] - small[0] * large[1] / large[0])
    if min(off_width, off_height) > MAX_OFF_PIXELS:
        raise SampleReject(OTHER_SHAPE, f"{size[0]} x {size[1]} of an image of {original[0]} x {original[1]}")


def _places(inputs: FeatureInputs) -> FeaturePlaces:
    settings = GIVEN_MAPS.read_settings(inputs)
    assert isinstance(settings, GivenSettings)
    key = f"{settings_key(inputs, GIVEN_MAPS)}.images"
    return find_places(settings.images, suffixes=SUFFIXES, run=inputs.run, key=key, missing=MISSING)


def given_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the encoding of the maps; a shard is known by its samples and their maps, wherever those lie."""
    require_own_crops(inputs, GIVEN_MAPS)
    places = _places(inputs)
    job = image_job(inputs, GIVEN_MAPS, worker_class=GivenMapWorker, also_decided_by={"control_version": CODE_VERSION})
    return replace(
        job,
        worker_config=replace(job.worker_config, beside=places),
        sources=imported_sources(places, inputs, key=f"{settings_key(inputs, GIVEN_MAPS)}.images"),
    )


def _plan(inputs: FeatureInputs) -> FamilyPlan:
    planned = plan_images(given_job(inputs), inputs)
    settings = GIVEN_MAPS.read_settings(inputs)
    assert isinstance(settings, GivenSettings)
    return replace(planned, basis=f"{KIND} ({settings.images}); {planned.basis}")


def _facts(job: FeatureJob, inputs: FeatureInputs) -> dict[str, Any]:
    # Where they were is of no use to whoever brings another map.
    return control_facts(job, inputs, kind=KIND, settings={}, identity=None)


GIVEN_MAPS = replace(
    LATENTS,
    name=NAME,
    is_wanted=lambda features: NAME in features.families,
    job=given_job,
    plan=_plan,
    facts=_facts,
    settings=GivenSettings,
    report=report_maps,
)

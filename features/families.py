"""The families of features there are; a new one is a file of its own and its record in this list."""

from errors import UserError
from features.constant_text import CONSTANT_TEXT
from features.control import DRAWN_MAPS
from features.control_given import GIVEN_MAPS
from features.imported_latents import IMPORTED_LATENTS
from features.imported_text import IMPORTED_TEXT
from features.jobs import FeatureFamily, FeatureInputs
from features.latents import LATENTS
from features.pixels import CROPS
from features.text import TEXT

FAMILIES = (TEXT, CONSTANT_TEXT, IMPORTED_TEXT, LATENTS, IMPORTED_LATENTS, CROPS, *DRAWN_MAPS, GIVEN_MAPS)


def wanted_families(inputs: FeatureInputs) -> list[FeatureFamily]:
    """Return the families that the stage's table of the recipe asks for, in the order in which they are made.

    Raises:
        UserError: it asks for one that there is not.
    """
    known = list(dict.fromkeys(family.name for family in FAMILIES))
    for name in inputs.features.families:
        if name not in known:
            key = f"features.{inputs.stage_name}.families.{name}"
            raise UserError(f"{key}: there is no such family; there are {', '.join(known)}")
    return [family for family in FAMILIES if family.is_wanted(inputs.features)]

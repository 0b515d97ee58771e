"""Keys of a stage that `trains = "control"`: the branch, and what leads it (ControlNet-Transformer, PixArt-delta)."""

import pydantic

from pipelines.recipe import Decides, TableConfig


class ControlKeys(TableConfig):
    """Those of `[training.<stage>]` that are of control branches alone; the defaults are the published ones."""

    control_copies: Decides[int] = pydantic.Field(
        default=13, ge=1, description="Of trains = 'control': copies of the first blocks that train (13 of 28)"
    )
    control_family: Decides[str | None] = pydantic.Field(
        default=None,
        pattern=r"^control-",
        description="Of trains = 'control': family of features that leads, as control-canny; null = the one that the "
        "features table has",
    )
    control_starts_from: str | None = pydantic.Field(
        default=None,
        description="Of trains = 'control': branch to go on from, of starts_from's weights: a stage that trained one, "
        "a checkpoint, a folder of diffusers' or PixArt-delta's .pth; null = copies of the blocks, which add nothing",
    )

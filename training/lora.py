"""`[training.<name>.lora]`: the adapters of a stage that `trains = "lora"` (LoRA, Hu et al. 2021)."""

import pydantic

from pipelines.recipe import Decides, TableConfig
from pixart.adapter_layers import TARGET_WORDS, AdapterShape


class LoraSettings(TableConfig):
    """Every setting of adapters; the defaults are those of PixArt's own script, with a scale of 1."""

    rank: Decides[int] = pydantic.Field(
        default=16, ge=1, le=1024, description="Rank of the change of each layer: 4 to 16 for a subject, more for much"
    )
    alpha: Decides[float | None] = pydantic.Field(
        default=None,
        gt=0,
        description="A change is multiplied by alpha / rank (rslora: alpha / sqrt(rank)); null = the rank",
    )
    targets: Decides[list[str]] = pydantic.Field(
        default=list(TARGET_WORDS),
        min_length=1,
        description=f"Layers that get adapters: words of {', '.join(TARGET_WORDS)} (all outside of blocks), or shell "
        "patterns of layers' names, as blocks.*.attention.query; diffusers' names, as to_q, count as well",
    )
    dora: Decides[bool] = pydantic.Field(
        default=False, description="Train the length of each row beside its direction (DoRA, Liu et al. 2024)"
    )
    rslora: Decides[bool] = pydantic.Field(
        default=False, description="Divide alpha by the root of the rank (rsLoRA, Kalajdzievski 2023)"
    )

    @property
    def shape(self) -> AdapterShape:
        """The same as the adapters' own code has it."""
        return AdapterShape(
            rank=self.rank,
            alpha=float(self.rank) if self.alpha is None else self.alpha,
            targets=tuple(self.targets),
            dora=self.dora,
            rslora=self.rslora,
        )

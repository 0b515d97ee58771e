"""Keys of a stage that say how weights move: the optimizer, how its rate goes over the steps, and the average."""

from typing import Annotated, Literal

import pydantic

from pipelines.recipe import Decides, TableConfig

DecayShape = Literal["linear", "cosine", "sqrt"]
# Relative to the steps done; that of the mean of all of them is 0.289.
SHORTEST_AVERAGE, LONGEST_AVERAGE = 0.02, 0.28
LEAST_DIFFERENCE = 0.005
Length = Annotated[float, pydantic.Field(ge=SHORTEST_AVERAGE, le=LONGEST_AVERAGE)]


class OptimizerKeys(TableConfig):
    """Those of `[training.<stage>]` that are of the optimizer, its rate and the average; without them, the paper's."""

    optimizer: Decides[Literal["adamw", "adamw8bit", "muon"]] = pydantic.Field(
        default="adamw",
        description="adamw; adamw8bit, whose moments take 2 bytes of a weight, not 8, sharded for as many ranks; or "
        "muon for the matrices of blocks, with adamw for the rest: fewer steps, and of a matrix one moment, not two",
    )
    learning_rate: Decides[float] = pydantic.Field(
        default=2e-5, gt=0, description="Peak learning rate of AdamW (paper: 2e-5)"
    )
    muon_learning_rate: Decides[float | None] = pydantic.Field(
        default=None,
        gt=0,
        description="Of optimizer = 'muon': peak learning rate of the matrices, which goes over the steps as "
        "learning_rate does, that of all else; null = learning_rate",
    )
    warmup_steps: Decides[int] = pydantic.Field(
        default=0, ge=0, description="Steps of linear warm-up of the learning rate"
    )
    decay_fraction: Decides[float] = pydantic.Field(
        default=0.0, ge=0, le=1, description="Last part of the stage, in which the rate falls to 0; 1 = from the start"
    )
    decay_shape: Decides[DecayShape] = pydantic.Field(
        default="linear",
        description="How it falls there, of r = the part that is over: linear (1 - r), cosine ((1 + cos pi r) / 2) or "
        "sqrt (1 - sqrt r: fast at first)",
    )
    adam_betas: Decides[tuple[float, float]] = pydantic.Field(
        default=(0.9, 0.999), strict=False, description="Decay of AdamW's first and second moments"
    )
    adam_epsilon: Decides[float] = pydantic.Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: Decides[float] = pydantic.Field(
        default=0.03, ge=0, description="AdamW's decoupled weight decay (paper: 0.03)"
    )
    gradient_clip: Decides[float] = pydantic.Field(
        default=0.01, gt=0, description="Largest norm of the gradient (paper: 0.01)"
    )
    ema: Decides[Literal["exponential", "power"]] = pydantic.Field(
        default="exponential",
        description="The weights' average: exponential, of a decay per step; or power, of a length relative to the "
        "steps done, of which two are kept, and any other is made after the fact (Karras et al. 2024)",
    )
    ema_decay: Decides[float] = pydantic.Field(
        default=0.9999, ge=0, lt=1, description="Decay per step of the weights' average"
    )
    ema_lengths: Decides[tuple[Length, Length]] = pydantic.Field(
        default=(0.05, 0.1),
        strict=False,
        description="Of ema = 'power': relative lengths of both averages; the first is exported and drawn with",
    )
    ema_snapshot_every: int = pydantic.Field(
        default=500, ge=1, description="Of ema = 'power': steps between averages that are kept, for other lengths"
    )

    @property
    def num_averages(self) -> int:
        """Averages of the weights that are kept up."""
        return len(self.ema_lengths) if self.ema == "power" else 1

    @pydantic.field_validator("ema_lengths")
    @classmethod
    def _check_lengths(cls, value: tuple[float, float]) -> tuple[float, float]:
        if abs(value[0] - value[1]) < LEAST_DIFFERENCE:
            raise ValueError(f"two averages of nearly one length are one: name two, {LEAST_DIFFERENCE} apart or more")
        return value

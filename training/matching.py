"""`[training.<name>.matching]`: what `objective = "distribution_matching"` makes of a student (DMD2, Yin 2024)."""

from collections.abc import Sequence
from typing import Annotated, Any

import pydantic

from errors import UserError
from pipelines.recipe import Decides, TableConfig
from pixart.processes.specs import lcm_student

Time = Annotated[int, pydantic.Field(ge=1, le=999)]


class MatchingSettings(TableConfig):
    """Every setting of distribution matching."""

    guidance_scale: Decides[float] = pydantic.Field(
        default=1.5,
        ge=1,
        allow_inf_nan=False,
        description="Guidance of the teacher, which is then inside the student; more is nearer to the prompt and "
        "further from real images, as colours saturate",
    )
    times: Decides[list[Annotated[list[Time], pydantic.Field(min_length=1, max_length=8)]]] = pydantic.Field(
        default=[[599], [899, 499]],
        min_length=1,
        description="Timesteps that the student is drawn at, falling: one list for each number of steps. A single step "
        "begins below 999, where noise is told from an image too hardly",
    )
    critic_learning_rate: Decides[float] = pydantic.Field(
        default=1e-3, gt=0, description="Learning rate of the critic, which must follow the student: well above its own"
    )
    consistency_weight: Decides[float] = pydantic.Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of consistency's loss beside it, at the same guidance: images stay nearer to real ones; "
        "its target is the student's average, one more network in memory. 0 = none",
    )
    compared_from: Decides[int] = pydantic.Field(
        default=20, ge=0, le=998, description="Lowest timestep at which the student's images are compared"
    )
    compared_to: Decides[int] = pydantic.Field(default=980, ge=1, le=1000, description="The highest of them, exclusive")

    @pydantic.field_validator("times")
    @classmethod
    def _check_times(cls, value: list[list[int]]) -> list[list[int]]:
        for times in value:
            if times != sorted(set(times), reverse=True):
                raise ValueError(f"times fall from step to step, and {times} do not")
        if len({len(times) for times in value}) < len(value):
            raise ValueError("there is one list for each number of steps, and two have as many")
        return value

    @property
    def student(self) -> dict[str, Any]:
        """What a process says of the student."""
        return lcm_student(guidance=self.guidance_scale, times=self.times)


def require_matchable(
    settings: MatchingSettings, *, network: str, process: str, trains: str | Sequence[str], optimizer: str, key: str
) -> None:
    """Refuse stages that no distribution can be matched in; `key` is the stage's.

    Raises:
        UserError: the network reads no text, the process is another, what trains is neither all weights nor adapters,
            or the optimizer has no rate for a critic.
    """
    named = f"{key}.objective = 'distribution_matching'"
    for name, value, *wanted in (
        ("network", network, "pixart"),
        ("process", process, "ddpm"),
        ("trains", trains, "all", "lora"),
        ("optimizer", optimizer, "adamw", "adamw8bit"),
    ):
        if value not in wanted:
            which = " or ".join(map(repr, wanted))
            raise UserError(f"{named} needs {name} = {which}, but {key}.{name} is {value!r}")
    if settings.compared_from >= settings.compared_to:
        raise UserError(
            f"{key}.matching.compared_from {settings.compared_from} is not below compared_to {settings.compared_to}"
        )

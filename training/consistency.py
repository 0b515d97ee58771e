"""`[training.<name>.consistency]`: what `objective = "consistency"` distils a teacher to (LCM, Luo et al. 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from errors import UserError
from pipelines.recipe import Decides, TableConfig
from pixart.processes.specs import LCM_TEACHER_STEPS, LCM_TIMESTEP_SCALING, lcm_student


class ConsistencySettings(TableConfig):
    """Every setting of consistency distillation; the defaults are those published, with LCM's range of guidance."""

    num_teacher_steps: Decides[int] = pydantic.Field(
        default=LCM_TEACHER_STEPS,
        ge=1,
        le=1000,
        description="Equal DDIM steps of the teacher; the student learns at their times and is drawn at some of them. "
        "Of process flow Euler's, before the shift; the student learns and is drawn at any times",
    )
    guidance_range: Decides[tuple[float, float]] = pydantic.Field(
        default=(4.0, 16.0),
        strict=False,
        description="Guidance scales of the teacher's steps, each sample's between both ends: the student is told "
        "it, and any can be chosen when drawing (LCM's w + 1: 4 to 16). Equal ends, as [5.5, 5.5], are one that is "
        "inside, of which trains = 'lora' needs one (PixArt-LCM: 5.5)",
    )
    huber_c: Decides[float] = pydantic.Field(
        default=0.001, gt=0, description="Differences well below it count as squares, those above it as they are"
    )
    guided_weight: Decides[float] = pydantic.Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Of a range of guidance: weight of the squared error of what the student says beside what the "
        "guided teacher says at the same time, falling to 0 over the stage. The error grows with the square of the "
        "guidance. With 0, as LCM was published, a student follows its guidance very late",
    )
    timestep_scaling: Decides[float] = pydantic.Field(
        default=LCM_TIMESTEP_SCALING,
        gt=0,
        description="Of process ddpm: timesteps times this, beside 0.5, say how much of the student's estimate is what "
        "it sees",
    )

    @pydantic.field_validator("guidance_range")
    @classmethod
    def _check_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError("a range is [low, high] with 1 <= low <= high, such as [4.0, 16.0]")
        return value

    @property
    def has_range(self) -> bool:
        """Whether there is more than one guidance, which the student is told."""
        return self.guidance_range[0] < self.guidance_range[1]

    def student(self, process: str) -> dict[str, Any]:
        """Return what the process, `ddpm` or `flow`, says of the student."""
        return lcm_student(
            guidance=self.guidance_range if self.has_range else self.guidance_range[0],
            num_teacher_steps=self.num_teacher_steps,
            timestep_scaling=None if process == "flow" else self.timestep_scaling,
        )


def require_distillable(
    settings: ConsistencySettings,
    *,
    network: str,
    process: Mapping[str, Any],
    trains: str | Sequence[str],
    key: str,
) -> None:
    """Refuse stages that cannot be distilled; `process` is their spec, and `key` the stage's.

    Raises:
        UserError: the network reads no text, a setting is of another process or of a range of guidance, a control
            branch trains, or adapters would have to hold an embedding. Or flow's network predicts the noise, whose
            students are ddpm's.
    """
    if network != "pixart":
        raise UserError(f"{key}.objective = 'consistency' is for a PixArt, but {key}.network is {network!r}")
    if trains == "control":
        raise UserError(
            f"{key}.objective = 'consistency' follows a teacher, which no image leads, and {key}.trains = 'control': "
            "train the branch beside the teacher (objective 'denoise'), and put it beside the student to draw "
            "(sampling.control_branch)"
        )
    if process["name"] == "flow" and process["prediction"] == "noise":
        raise UserError(
            f"{key}.flow_prediction = 'noise' has no students: to networks that predict the noise those of ddpm are "
            "open, whatever they were trained with: say process = 'ddpm'"
        )
    if process["name"] == "flow" and "timestep_scaling" in settings.model_fields_set:
        raise UserError(
            f"{key}.consistency.timestep_scaling = {settings.timestep_scaling:g} is for process ddpm, but "
            f"{key}.process is 'flow', whose estimates need no scalings: leave it out"
        )
    if "guided_weight" in settings.model_fields_set and settings.guided_weight and not settings.has_range:
        raise UserError(
            f"{key}.consistency.guided_weight = {settings.guided_weight:g} is for a range of guidance, which a "
            f"student is told, and guidance_range is {list(settings.guidance_range)}: leave it out"
        )
    if trains == "lora" and settings.has_range:
        raise UserError(
            f"{key}.trains = 'lora' has no place for an embedding of the guidance, and consistency.guidance_range is "
            f"{list(settings.guidance_range)}: choose one guidance, as [5.5, 5.5], or train all weights"
        )

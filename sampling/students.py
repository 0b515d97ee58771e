"""Weights that were distilled to few steps: how they are drawn from where nobody says it, and what is odd about more.

Guidance is inside them. Of a range that they are told one of, the one that is asked for is folded into the weights when
they are loaded; then, and where their own is drawn with, no pass has a null half. Nothing here needs torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from errors import UserError
from pixart.processes.specs import (
    LCM,
    clamped_guidance,
    described_steps,
    guidance_range,
    has_trained_steps,
    own_times,
    student_of,
    student_of_process,
    usual_steps,
)
from sampling.config import SamplingConfig
from sampling.trained_model import TrainedModel


def follow_weights(config: SamplingConfig, trained: TrainedModel) -> tuple[SamplingConfig, TrainedModel]:
    """Return settings in which what is not typed is as a student was made for, and the model with the guidance inside.

    Others that are drawn with lcm count for students of which nobody says what is inside. A `guidance_scale` is that of
    the images, wherever it comes from.
    """
    student = student_of(trained.process)
    if student is None and config.solver == LCM:
        student = student_of_process(trained.process["name"])
    if student is None or trained.inner_guidance is not None:
        return config, trained
    typed, update = config.model_fields_set, {}
    if "solver" not in typed:
        update["solver"] = student["method"]
    if "num_steps" not in typed and config.times is not None:
        update["num_steps"] = len(config.times)
    elif "num_steps" not in typed and update.get("solver", config.solver) == student["method"]:
        update["num_steps"] = usual_steps(student)
    steps = update.get("num_steps", config.num_steps)
    if config.times is None and update.get("solver", config.solver) == student["method"]:
        update["times"] = own_times(student, steps)
    own = clamped_guidance(student)
    scale = config.guidance_scale if "guidance_scale" in typed else own or 1.0
    is_told = guidance_range(student) is not None
    if own is not None and not is_told and scale in (1.0, own):  # off: as the weights are by themselves
        scale = own
    inner = scale if is_told or scale == own else None
    update["guidance_scale"] = scale
    return config.model_copy(update=update), replace(trained, inner_guidance=inner)


def student_identity(trained: TrainedModel) -> dict[str, Any]:
    """Return what decides the images of a student beside what decides those of others."""
    student = student_of(trained.process)
    if student is None:
        return {}
    numbers = {name: student[name] for name in ("num_teacher_steps", "timestep_scaling") if name in student}
    return {"student": {**numbers, "guidance": trained.inner_guidance}}


def describe_oddities(config: SamplingConfig, trained: TrainedModel) -> Iterator[str]:
    """Yield what is odd about drawing weights otherwise than they were made for, by settings that are followed."""
    student = student_of(trained.process)
    if student is None:
        if config.solver == LCM:
            yield (
                f"nothing says that {trained.name} was distilled to few steps, and solver lcm draws such weights "
                "alone: of others images are blurred"
            )
        return
    has_few = config.solver == student["method"] and has_trained_steps(student, config.num_steps, config.times)
    if not (has_few and _is_inside(config.guidance_scale, student)):
        at = "" if config.times is None else f" at {', '.join(map(str, config.times))}"
        yield (
            f"{trained.name} was trained for {student['method']} with {described_steps(student)} and "
            f"{_describe_guidance(student)}, and is drawn with {config.solver}, {config.num_steps} steps{at}, guidance "
            f"{config.guidance_scale:g}"
        )
    if trained.inner_guidance is not None or config.guidance_scale == 1:
        for name in ("guidance_interval", "negative_prompt"):
            if getattr(config, name):
                yield f"sampling.{name} does nothing: the guidance of {trained.name} is inside its weights"
    if config.cache is not None and config.solver == LCM:
        yield "sampling.cache takes what blocks gave a pass before, but lcm has new noise in every one: images suffer"


def _is_inside(scale: float, student: Mapping[str, Any]) -> bool:
    if (ends := guidance_range(student)) is not None:
        return ends[0] <= scale <= ends[1]
    return scale == (student["guidance"] or 1.0)


def _describe_guidance(student: Mapping[str, Any]) -> str:
    if (ends := guidance_range(student)) is not None:
        return f"guidance {ends[0]:g} to {ends[1]:g}"
    return "guidance inside" if student["guidance"] is None else f"guidance {student['guidance']:g} inside"


def require_choosable_guidance(trained: TrainedModel, *, key: str) -> None:
    """Refuse to draw weights over a range of guidance that have but one.

    Raises:
        UserError: it is inside the weights; names the `key` that asks for several.
    """
    student = student_of(trained.process)
    if student is not None and guidance_range(student) is None:
        raise UserError(
            f"{key}: {trained.name} was distilled by {student['method']} with {_describe_guidance(student)}, which no "
            "pass can change: there is one point of a curve, which `eval` measures"
        )

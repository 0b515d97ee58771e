"""Weights distilled to few steps on their way out: the one guidance that diffusers and original code draw them with."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from errors import UserError
from pixart.dit import DiT
from pixart.guidance_condition import fold_guidance
from pixart.model import PixArt
from pixart.processes.specs import (
    clamped_guidance,
    described_steps,
    guidance_range,
    own_times,
    student_of,
    usual_steps,
)


def with_one_guidance(
    network: DiT | PixArt, process: Mapping[str, Any], wanted: float | None, *, source: str
) -> tuple[DiT | PixArt, dict[str, Any]]:
    """Return the network with one guidance inside, and its process with what is inside; others as they are.

    Args:
        network: in which it is folded into the timestep's embedding, where it is told its guidance.
        process: that it was trained with.
        wanted: the scale; None is the usual one, or the nearest that it was trained with.
        source: what people call the weights.

    Raises:
        UserError: a guidance is wanted of weights that are told none, or is none; or nothing says which they are told.
    """
    if wanted is not None and not 1 <= wanted < math.inf:
        raise UserError(f"CFG is {wanted:g}, not a guidance of 1, for none, or more")
    student = student_of(process)
    ends = None if student is None else guidance_range(student)
    if student is None or ends is None:
        if wanted is not None and (student is None or wanted != student["guidance"]):
            has = "it is chosen in drawing" if student is None else "what is inside is there to stay"
            raise UserError(f"CFG is {wanted:g}, but {source} is not told its guidance: {has}, leave CFG out")
        if network.kind == "pixart" and network.config.has_guidance_condition:
            raise UserError(f"{source} is told its guidance, and nothing says which it was trained with")
        return network, dict(process)
    scale = clamped_guidance(student) if wanted is None else wanted
    assert scale is not None, "a range has a usual guidance"
    if network.kind == "pixart" and network.config.has_guidance_condition:
        network = fold_guidance(network.float(), scale)
    return network, {**process, "student": {**student, "guidance": scale}}


def describe_one_guidance(former: Mapping[str, Any], process: Mapping[str, Any]) -> Iterator[str]:
    """Yield what to say of weights that are written: which guidance is inside, and how they are drawn."""
    student, before = student_of(process), student_of(former)
    if student is None or before is None:
        return
    scale, ends = student["guidance"], guidance_range(before)
    inside = "guidance is inside" if scale is None else f"guidance {scale:g} is inside"
    if ends is not None and scale is not None and not ends[0] <= scale <= ends[1]:
        inside += f", which is outside of the {ends[0]:g} to {ends[1]:g} that it was trained with"
    yield (
        f"distilled by {student['method']}: {inside}; {described_steps(student)} draw it, as {typed_steps(student)}, "
        "without guidance of the pipeline's own, guidance_scale=1.0"
    )


def typed_steps(student: Mapping[str, Any]) -> str:
    """Return what a pipeline of diffusers is called with for the steps that a student is drawn in."""
    steps = usual_steps(student)
    times = own_times(student, steps)
    return f"num_inference_steps={steps}" if times is None else f"timesteps={times}"

"""Parts `train_256`, `train_512`, `train_1024` and `heads64_256`: a training step of XL/2, ours against diffusers'."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.parts import Figures, Size
from benchmarks.gpu.steps import Timing, diffusers_step, largest_fitting, measure_step, mfu, our_step
from benchmarks.train import Case

# The paper's batches are 178 and 12; of 176, eight times 22, kernels make more.
XL_256 = Case(width=1152, num_layers=28, pixels=256, batch_size=176)
XL_512 = Case(width=1152, num_layers=28, pixels=512, batch_size=44)
XL_1024 = Case(width=1152, num_layers=28, pixels=1024, batch_size=12)
XL_256_HEADS_64 = Case(width=1152, num_layers=28, pixels=256, batch_size=176, head_dim=64)
TINY = Case(width=144, num_layers=1, pixels=64, batch_size=2, caption_channels=16)
TINY_HEADS_64 = Case(width=128, num_layers=1, pixels=64, batch_size=2, caption_channels=16, head_dim=64)


def train_256(size: Size) -> Figures:
    """256px, batch 176."""
    return _against_diffusers("train_256", TINY if size.is_tiny else XL_256, size=size)


def train_512(size: Size) -> Figures:
    """512px, batch 44."""
    return _against_diffusers("train_512", TINY if size.is_tiny else XL_512, size=size)


def train_1024(size: Size) -> Figures:
    """1024px, batch 12."""
    return _against_diffusers("train_1024", TINY if size.is_tiny else XL_1024, size=size)


def heads64_256(size: Size) -> Figures:
    """XL/2 with 18 heads of 64 against 16 of 72, both ours: the same weights, in other heads."""
    name = "heads64_256"
    cases = (TINY, TINY_HEADS_64) if size.is_tiny else (XL_256, XL_256_HEADS_64)
    timings: list[Timing] = []
    for case, heads in zip(cases, ("72", "64"), strict=True):
        timings.append(measure_step(partial(our_step, case, device=size.device), device=size.device))
        size.keep(_figures(f"{name}_of_{heads}", case, timings[-1], device=size.device))
    return {f"{name}_ratio": round(timings[0].seconds / timings[1].seconds, 3)}


def _against_diffusers(name: str, case: Case, *, size: Size) -> Figures:
    device = size.device
    timings: dict[str, Timing] = {}

    def measure(case: Case) -> None:
        sides = {
            # Eager needs most memory and no compiler: what does not fit is known early.
            "diffusers_eager": partial(diffusers_step, case, device=device, is_compiled=False),
            "ours": partial(our_step, case, device=device),
            "diffusers_compiled": partial(diffusers_step, case, device=device, is_compiled=True),
        }
        for side, make in sides.items():
            timings[side] = measure_step(make, device=device)
            size.keep({f"{name}_batch": case.batch_size})
            size.keep(_figures(f"{name}_{side}", case, timings[side], device=device))

    case = largest_fitting(case, measure)
    ours = timings["ours"]
    return {
        f"{name}_ratio_compiled": round(timings["diffusers_compiled"].seconds / ours.seconds, 3),
        f"{name}_ratio_eager": round(timings["diffusers_eager"].seconds / ours.seconds, 3),
        f"{name}_mfu": _rounded(mfu(case, ours.seconds, device=device)),
        f"{name}_loss_difference": round(abs(ours.loss / timings["diffusers_eager"].loss - 1), 5),
    }


def _figures(name: str, case: Case, timing: Timing, *, device: str) -> Figures:
    return {
        f"{name}_step_seconds": round(timing.seconds, 4),
        f"{name}_images_per_second": round(case.batch_size / timing.seconds, 1),
        f"{name}_peak_gigabytes": round(timing.peak_gigabytes, 1),
        f"{name}_mfu": _rounded(mfu(case, timing.seconds, device=device)),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

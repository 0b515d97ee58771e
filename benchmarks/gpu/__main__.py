"""`make bench-gpu`: what the house does on one CUDA device, against what others do on it, part by part.

Each part is a process of its own with a limit of time, forked from this one, which imports the large libraries once
and never touches CUDA. All share one cache of what is compiled. A part that fails, dies or is late says so and leaves
the others alone; one that the whole run has no time for is not started. Rows for docs/BENCHMARKS.md are printed as
parts end; the last line is one JSON object. Both are in benchmarks/results/ after every part. `--tiny` runs the same
code small on a CPU: nothing it prints says anything of speed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.gpu import report
from benchmarks.gpu.parts import PARTS, Figures, Part, Size
from benchmarks.gpu.process import Outcome, run_job

PART_SECONDS, TOTAL_SECONDS = 75.0, 600.0
# A part with less time would hardly come past its compiler, and take it from nobody: the next has no more.
LEAST_SECONDS = 40.0
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
LIBRARIES = (
    "torch",
    "transformers.models.llava.modeling_llava",
    "transformers.models.t5.modeling_t5",
    "diffusers.models.transformers.pixart_transformer_2d",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha",
)


def chosen_parts(names: str | None, parts: Sequence[Part]) -> list[Part]:
    """Return the parts of a comma-separated list in their own order; all for None.

    Raises:
        ValueError: a name is of no part.
    """
    if names is None:
        return list(parts)
    wanted = {name.strip() for name in names.split(",")} - {""}
    unknown = sorted(wanted - {part.name for part in parts})
    if unknown:
        raise ValueError(f"no part is called {', '.join(unknown)}; there are {', '.join(part.name for part in parts)}")
    return [part for part in parts if part.name in wanted]


def part_job(part: Part, *, is_tiny: bool) -> Callable[[Callable[[Figures], None]], Figures]:
    """Return what a part's process runs."""

    def job(keep: Callable[[Figures], None]) -> Figures:
        function = getattr(importlib.import_module(part.module), part.name)
        if is_tiny:
            # What is asked to be compiled runs as it is: a compiler takes longer than all the rest.
            importlib.import_module("torch").compiler.set_stance("force_eager")
        return function(Size(is_tiny=is_tiny, keep=keep))

    return job


def import_libraries() -> None:
    """Import what parts need, without touching CUDA: a process that has cannot be forked into one that may.

    Raises:
        RuntimeError: CUDA was initialised all the same.
    """
    import torch.utils._triton

    # torchao asks while it is imported whether the card can run Triton, which initialises CUDA: it sees none, and what
    # torch remembers of the answer is forgotten.
    visible = os.environ.get(VISIBLE_DEVICES)
    os.environ |= {VISIBLE_DEVICES: "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    for library in LIBRARIES:
        importlib.import_module(library)
    del os.environ[VISIBLE_DEVICES]
    if visible is not None:
        os.environ[VISIBLE_DEVICES] = visible
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    if torch.cuda.is_initialized():
        raise RuntimeError(f"importing {', '.join(LIBRARIES)} has initialised CUDA, so no part can be forked")


def run_parts(
    parts: Sequence[Part], *, is_tiny: bool, part_seconds: float, deadline_seconds: float
) -> tuple[Figures, bool]:
    """Run parts one after the other, until `deadline_seconds` of `time.perf_counter`.

    Returns all figures, and whether every part came to its end.
    """
    outcome = None if is_tiny else run_job(lambda keep: report.describe_device(), limit_seconds=60)
    device: Figures = {"device": "cpu"} if outcome is None else outcome.figures
    figures: Figures = {"is_tiny": is_tiny, **device, **report.describe_software()}
    if outcome is not None and device.get("device") is None:
        reason = outcome.error or "no CUDA device is here; --tiny runs the parts small on a CPU"
        print(f"bench-gpu: {reason}", file=sys.stderr)
        return figures, False
    print(f"{device['device']}\n\n{report.HEADER}", flush=True)
    rows, has_failed = [], False
    name = "gpu-tiny" if is_tiny else "gpu"
    report.write(figures, rows, name=name)  # so that no older run is taken for this one
    for part in parts:
        left_seconds = deadline_seconds - time.perf_counter()
        if left_seconds < min(part_seconds, LEAST_SECONDS):
            outcome = Outcome(error=f"{report.NOT_STARTED}: {max(0.0, left_seconds):.0f} s left")
        else:
            outcome = run_job(part_job(part, is_tiny=is_tiny), limit_seconds=min(part_seconds, left_seconds))
        found = report.figures_of(part, outcome)
        figures |= found
        has_failed |= outcome.error is not None
        rows.append(report.row(part, found))
        print(rows[-1], flush=True)
        if outcome.trace:
            print(outcome.trace, file=sys.stderr, flush=True)
        report.write(figures, rows, name=name)
    return figures, not has_failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run parts, print rows and as last line the JSON object; returns 1 if a part did not come to its end."""
    start_seconds = time.perf_counter()
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="The house on one CUDA device, part by part.")
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("parts", nargs="?", help=f"comma-separated, of {names}; default: all")
    parser.add_argument("--tiny", action="store_true", help="run small on a CPU, to see that all of it runs")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="limit of a part (%(default)g)")
    parser.add_argument("--total-seconds", type=float, default=TOTAL_SECONDS, help="limit of the run (%(default)g)")
    options = parser.parse_args(argv)
    try:
        parts = chosen_parts(options.parts, PARTS)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the part that runs, too
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", ignore_cleanup_errors=True) as folder:
        # Networks of several parts are the same: what one has compiled, the next finds.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        os.environ.setdefault("TRITON_CACHE_DIR", f"{folder}/triton")
        import_libraries()
        figures, is_complete = run_parts(
            parts,
            is_tiny=options.tiny,
            part_seconds=options.seconds,
            deadline_seconds=start_seconds + options.total_seconds,
        )
    print(json.dumps(figures), flush=True)
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())

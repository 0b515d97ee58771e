"""What a run of the parts leaves: rows for docs/BENCHMARKS.md, and one JSON object with all figures."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.parts import Figures, Part
from benchmarks.gpu.process import Outcome
from pipelines.store.files import atomic_write_bytes

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "torchao", "flash-attn-4")
HEADER = "| part | figures | bar | |\n|---|---|---|---|"
MAX_ERROR_CHARS = 400
NOT_STARTED = "not started"


def describe_software() -> Figures:
    """Return the versions of what is measured, of packages that are here, and today's date."""
    found: Figures = {"date": datetime.date.today().isoformat()}
    for package in PACKAGES:
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_device() -> Figures:
    """Name the CUDA device that the calling process sees; it then has touched CUDA."""
    import torch

    if not torch.cuda.is_available():
        return {"device": None}
    properties = torch.cuda.get_device_properties(0)
    return {"device": properties.name, "device_gigabytes": round(properties.total_memory / 1e9, 1)}


def figures_of(part: Part, outcome: Outcome) -> Figures:
    """Return a part's figures as they stand in the JSON object, with its error if it has failed."""
    figures = {**outcome.figures, f"{part.name}_seconds": round(outcome.seconds, 1)}
    if outcome.error is not None:
        figures[f"{part.name}_error"] = outcome.error[:MAX_ERROR_CHARS]
    return figures


def row(part: Part, figures: Figures) -> str:
    """Return a part as a row of Markdown: what was measured, its bars, and whether they are met."""
    error = figures.get(f"{part.name}_error")
    told = {key: value for key, value in figures.items() if value is not None and not key.endswith("_error")}
    measured = [f"{_short(part, key)} {value}" for key, value in told.items()]
    if error is not None:
        failed = "" if str(error).startswith(NOT_STARTED) else "failed: "
        measured.append(f"**{failed}" + str(error).replace("|", "\\|").replace("\n", " ") + "**")
    bars = "; ".join(_short(part, str(bar)) for bar in part.bars)
    verdicts = "; ".join(bar.verdict(figures) for bar in part.bars)
    return f"| `{part.name}` | {', '.join(measured)} | {bars} | {verdicts} |"


def _short(part: Part, key: str) -> str:
    return key.removeprefix(f"{part.name}_").replace("_", " ")


def write(figures: Figures, rows: Sequence[str], *, name: str) -> None:
    """Write `benchmarks/results/<name>.json` and `.md`."""
    RESULTS.mkdir(exist_ok=True)
    atomic_write_bytes(RESULTS / f"{name}.json", (json.dumps(figures, indent=2) + "\n").encode())
    atomic_write_bytes(RESULTS / f"{name}.md", "\n".join([HEADER, *rows, ""]).encode())

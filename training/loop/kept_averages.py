"""Power averages that a stage has kept on the way, and the average of any length made of them (Karras et al. 2024)."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from pipelines.store.files import atomic_file, remove_temporary_files
from training.loop.power_average import combination

FOLDER = "averages"
OURS = re.compile(r"step-([1-9]\d*)\.safetensors")
LENGTHS = "lengths"


@dataclass(frozen=True, kw_only=True)
class MadeAverage:
    """An average made of others.

    Attributes:
        weights: fp32 on the CPU, by name.
        step: steps done that it is after.
        num_kept: averages that it is made of.
        error: how far its weighing of the steps is from the one that was asked for, as a part of that one's norm.
    """

    weights: dict[str, Tensor]
    step: int
    num_kept: int
    error: float


def path_of(stage_directory: Path, step: int) -> Path:
    """Return where the averages of a step are kept."""
    return stage_directory / FOLDER / f"step-{step}.safetensors"


def write_averages(path: Path, weights: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Write averages, weights by length and name, in fp16, as the paper's code keeps them."""
    tensors = {_key(length, name): weight.half() for length in weights for name, weight in weights[length].items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={LENGTHS: json.dumps(list(weights))})


def drop_averages(stage_directory: Path, *, after_step: int) -> None:
    """Remove averages of later steps, of a training that is not gone on with, and what killed writers have left."""
    folder = stage_directory / FOLDER
    if not folder.is_dir():
        return
    remove_temporary_files(folder, is_held=True)
    for step in _steps(folder):
        if step > after_step:
            path_of(stage_directory, step).unlink()


def make_average(stage_directory: Path, *, length: float, last: int) -> MadeAverage:
    """Return the average of a relative length after the last step, of those up to `last`, that averages are kept of.

    Raises:
        UserError: there are none, or a file cannot be read.
    """
    steps = [step for step in _steps(stage_directory / FOLDER) if step <= last]
    if not steps:
        raise UserError(
            f"{stage_directory / FOLDER} has no averages of steps up to {last:,}: a stage keeps them that trains with "
            "training.ema = 'power', every training.ema_snapshot_every steps and after the last"
        )
    kept = [(step, each) for step in steps for each in _lengths(path_of(stage_directory, step))]
    factors, error = combination(kept, step=steps[-1], length=length)
    sums: dict[str, Tensor] = {}
    for step in steps:
        path = path_of(stage_directory, step)
        mine = {each: factor for (its, each), factor in zip(kept, factors.tolist(), strict=True) if its == step}
        try:
            _add(sums, path, mine)
        except (OSError, SafetensorError) as error_of_file:
            raise _unreadable(path, error_of_file) from error_of_file
    weights = {name: weight.float() for name, weight in sums.items()}
    return MadeAverage(weights=weights, step=steps[-1], num_kept=len(kept), error=error)


def _steps(folder: Path) -> list[int]:
    """Return the steps that averages are kept of, rising."""
    found = [OURS.fullmatch(path.name) for path in folder.glob("*.safetensors")]
    return sorted(int(match[1]) for match in found if match is not None)


def _add(sums: dict[str, Tensor], path: Path, factors: Mapping[float, float]) -> None:
    """Add the averages of a file, each times its factor, to `sums` by name, fp64."""
    with safe_open(path, framework="pt") as file:
        for length, factor in factors.items():
            first = _key(length, "")
            for key in file.keys():  # noqa: SIM118, it is no mapping
                if key.startswith(first):
                    name, part = key.removeprefix(first), factor * file.get_tensor(key).double()
                    sums[name] = part if name not in sums else sums[name].add_(part)


def _lengths(path: Path) -> list[float]:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()[LENGTHS])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({error}): `rm {path}`, and the average is made of the others")


def _key(length: float, name: str) -> str:
    return f"{length!r}/{name}"

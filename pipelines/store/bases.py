"""The weights that adapters or a control branch belong to: where they were, and what tells them from others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError
from pipelines.store.checkpoints import BASE, Checkpoint
from pipelines.store.files import sha256_file

RUN = "{run}"


@dataclass(frozen=True, kw_only=True)
class Base:
    """Weights that a checkpoint's adapters change, or that its control branch leads.

    Attributes:
        path: their diffusers folder, or an original file.
        identity: hash of them, as `encoders.weights.identity_of` gives it.
        shape: the fields of the trained network's config.
        adapters: folders of other adapters, merged into the weights first, in this order.
    """

    path: Path
    identity: str
    shape: Mapping[str, Any]
    adapters: tuple[Path, ...] = ()


def describe_base(
    path: Path, adapters: tuple[Path, ...], *, run: Path, identity: str, shape: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a base as `trainer.json` has it; places below the run are kept as such, as runs are moved."""
    return {
        "location": _below(path, run),
        "identity": identity,
        "shape": dict(shape),
        "adapters": [{"location": _below(adapter, run), "identity": adapter_identity(adapter)} for adapter in adapters],
    }


def base_of(checkpoint: Checkpoint, *, identify: Callable[[Path], str] | None) -> Base:
    """Return the weights that a checkpoint's adapters or its control branch belong to.

    `identify` hashes weights, to compare them with what they were; None where another process has done so.

    Raises:
        MissingFileError: they are not where they were; says where that is, and how to draw with them elsewhere.
        UserError: they are others now.
    """
    stored = checkpoint.trainer[BASE]
    run = checkpoint.path.absolute().parents[2]
    places = [_place(item["location"], run) for item in (stored, *stored["adapters"])]
    for place in places:
        if not place.exists():
            raise MissingFileError(
                f"{checkpoint.weights} belongs to the weights of {place}, which are not there any more: put them back, "
                f"or name them where they are: {_ways_to_draw(checkpoint, '…')}"
            )
    checks = [identify, *[adapter_identity] * len(stored["adapters"])] if identify else []
    for item, place, check in zip((stored, *stored["adapters"]), places, checks, strict=False):
        if check(place) != item["identity"]:
            raise UserError(
                f"{checkpoint.weights} was trained on {place}, whose weights are others now: put those back, or draw "
                f"with these as they are: {_ways_to_draw(checkpoint, str(places[0]))}"
            )
    return Base(path=places[0], identity=stored["identity"], shape=stored["shape"], adapters=tuple(places[1:]))


def _ways_to_draw(checkpoint: Checkpoint, base: str) -> str:
    """Return the keys that name a checkpoint's weights and those they belong to one by one."""
    weights = checkpoint.weights
    own = f"sampling.control_branch = '{weights}'" if checkpoint.has_control else f"sampling.lora = ['{weights}']"
    return f"sampling.checkpoint = '{base}' and {own}"


def adapter_identity(folder: Path) -> str:
    """Return the hash of an adapter's file in a checkpoint."""
    return f"sha256:{sha256_file(next(iter(sorted(folder.glob('*.safetensors')))))}"


def _below(path: Path, run: Path) -> str:
    path, run = path.absolute(), run.absolute()
    return f"{RUN}/{path.relative_to(run).as_posix()}" if path.is_relative_to(run) else str(path)


def _place(location: str, run: Path) -> Path:
    return run / location.removeprefix(f"{RUN}/") if location.startswith(f"{RUN}/") else Path(location)

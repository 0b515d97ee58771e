"""Adapters that a recipe adds to the weights that it draws from: `sampling.lora`, each with its weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_path
from pipelines.engine.progress import get_logger
from pipelines.store import bases
from pipelines.store.checkpoints import ADAPTER, named_checkpoint
from pipelines.store.files import sha256_file, sha256_text
from pixart.processes.specs import with_student_of
from sampling.trained_model import TrainedModel, WeightedAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pixart.adapters import Adapter

log = get_logger("sampling")
KEY, WEIGHTS_KEY = "sampling.lora", "sampling.lora_weights"


def add_adapters(
    trained: TrainedModel, wanted: Sequence[str], weights: Sequence[float] | None, *, run: Path
) -> TrainedModel:
    """Return the model with adapters to be merged into its weights, all of which are looked at here.

    One that the model is a checkpoint of is not added a second time: it gets this weight in the place of 1.

    Args:
        trained: what is drawn from.
        wanted: files, folders, and checkpoints or stages of training that have adapters; `{run}` is the run's folder.
        weights: one for each; None is 1 for all. One alone, without adapters, is for the model's own.
        run: the run's folder.

    Raises:
        MissingFileError: one is not there.
        UserError: it is no adapter or another model's, or there are not as many weights.
    """
    wanted = name_adapters(trained, wanted, weights, run=run)
    if weights is not None and len(weights) != len(wanted):
        raise UserError(f"{WEIGHTS_KEY} has {len(weights)} weights for {len(wanted)} adapters of {KEY}: give as many")
    if not wanted:
        return trained
    files = [find_file(location, run=run) for location in wanted]
    added = tuple(
        WeightedAdapter(path=file, location=location, weight=weight, identity=adapter_identity(file))
        for file, location, weight in zip(files, wanted, weights or [1.0] * len(files), strict=True)
    )
    trained = _as_student(trained, _require_fit(trained, files), weights or [1.0] * len(files))
    contents = {sha256_file(file) for file in files}
    kept = tuple(path for path in trained.own_adapters if _content(path) not in contents)
    own = {_content(path) for path in trained.own_adapters}
    name, parts = trained.name, []
    for adapter in added:
        is_own = sha256_file(adapter.path) in own
        name += f" at {adapter.weight:g}" if is_own else f" + {adapter.title}"
        parts.append(f"{'own ' if is_own else ''}{adapter.weight:g} {adapter.identity}")
    return replace(
        trained,
        name=name,
        identity=f"{trained.identity}+sha256:{sha256_text(chr(10).join(parts))}",
        own_adapters=kept,
        adapters=(*trained.adapters, *added),
    )


def name_adapters(
    trained: TrainedModel, wanted: Sequence[str], weights: Sequence[float] | None, *, run: Path
) -> Sequence[str]:
    """Return the adapters wanted; where there is a weight and none of them, the model's own, if it has one."""
    if wanted or trained.checkpoint is None or weights is None or len(weights) != 1:
        return wanted
    if not (trained.checkpoint / ADAPTER).is_dir():
        return wanted
    folder = trained.checkpoint
    is_here = trained.run is not None and trained.run.resolve() == run.resolve()
    return [f"{bases.RUN}/training/{folder.parent.name}/{folder.name}" if is_here else str(folder)]


def _content(folder: Path) -> str:
    from pixart.adapter_files import find_adapter_file

    return sha256_file(find_adapter_file(folder))


def adapter_identity(file: Path) -> str:
    """Return a hash of an adapter's file and of the settings beside it."""
    settings = file.parent / "adapter_config.json"
    parts = [file, *([settings] if file.name.startswith("adapter_model.") and settings.is_file() else [])]
    return f"sha256:{sha256_text(' '.join(map(sha256_file, parts)))}"


def find_file(location: str, *, run: Path) -> Path:
    """Return the file of an adapter that is named by itself, its folder, a checkpoint or a stage's folder.

    Raises as `add_adapters` does.
    """
    from pixart.adapter_files import find_adapter_file

    path = typed_path(location.replace("{run}", str(run)))
    checkpoint = named_checkpoint(path)
    if checkpoint is not None and not checkpoint.has_adapters:
        if checkpoint.has_control:
            raise UserError(f"{KEY} {path} is a control branch, and no adapter: name it as sampling.control_branch")
        raise UserError(f"{KEY} {path} is a checkpoint of a whole network, and no adapter: name it as the checkpoint")
    try:
        return find_adapter_file(path if checkpoint is None else checkpoint.weights)
    except MissingFileError as error:
        raise MissingFileError(f"{KEY}: {error}") from None


def _as_student(trained: TrainedModel, adapters: Sequence[Adapter], weights: Sequence[float]) -> TrainedModel:
    """Return the model as adapters make it: a student, where one of them was distilled to few steps (LCM-LoRA)."""
    for adapter, weight in zip(adapters, weights, strict=True):
        if weight:
            trained = replace(trained, process=with_student_of(trained.process, adapter.belongs_to))
    return trained


def _require_fit(trained: TrainedModel, files: Sequence[Path]) -> list[Adapter]:
    """Open adapters; refuse those of another model or process, and say what is odd about the others."""
    from pixart.adapter_files import read_adapter
    from pixart.adapters import require_fit
    from pixart.model import PixArt

    if trained.kind != "pixart":
        raise UserError(f"{KEY} is set, but {trained.name} is a class-conditional DiT: adapters are for a PixArt")
    network = trained.blank()
    assert isinstance(network, PixArt)
    adapters = []
    for file in files:
        try:
            adapter = read_adapter(file, network.config)
            require_fit(adapter, network)
        except UserError as error:
            raise UserError(f"{KEY}: {error}") from None
        for note in adapter.notes:
            log.warning(note)
        compare_belonging(adapter.path, adapter.belongs_to, trained)
        adapters.append(adapter)
    return adapters


def compare_belonging(path: Path, belongs_to: Mapping[str, Any], trained: TrainedModel) -> None:
    """Compare what the file of an adapter or a control branch says that it belongs to with what it is to be added to.

    What is odd is said.

    Raises:
        UserError: it was trained with another process.
    """
    from encoders.likeness import is_same_codec, is_same_text_encoder
    from pixart.belonging import compare_base

    said = compare_base(
        path,
        belongs_to,
        title=trained.name,
        location=str(trained.model_path),
        identity=trained.identity.partition("+")[0],
        adapters=set(map(bases.adapter_identity, trained.own_adapters)),
        process=trained.process,
    )
    for line in said:
        log.warning(line)
    for part, is_same in (("text", is_same_text_encoder), ("vae", is_same_codec)):
        here, there = getattr(trained, part), belongs_to.get(part)
        if here is not None and there is not None and not is_same([here["model"]], [there["model"]]):
            log.warning(f"{path} was trained with {part} {there['model']!r}, and is drawn with {here['model']!r}")

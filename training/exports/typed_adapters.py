"""Adapters to merge as they are typed: LORA names them, WEIGHTS says how much of each."""

import math
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.store.checkpoints import named_checkpoint
from pixart.adapter_files import find_adapter_file, read_adapter
from pixart.adapters import Adapter, require_fit
from pixart.model import PixArt


def typed_weights(typed: str, locations: Sequence[str]) -> list[float]:
    """Return how much of each adapter WEIGHTS asks for, 1 where it is not typed.

    Raises:
        UserError: these are no numbers, or not as many as adapters.
    """
    if not locations:
        raise UserError(f"WEIGHTS is {typed!r}, but LORA names no adapters")
    if not all(locations):
        raise UserError(f"LORA is {','.join(locations)!r}: type paths with a comma between them, as a.safetensors,b")
    if not typed:
        return [1.0] * len(locations)
    try:
        weights = [float(weight) for weight in typed.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(map(math.isfinite, weights)):
        raise UserError(f"WEIGHTS is {typed!r}: type finite numbers with a comma between them, as 0.8,0.5")
    if len(weights) != len(locations):
        raise UserError(f"WEIGHTS has {len(weights)} numbers for {len(locations)} adapters of LORA: type as many")
    return weights


def find_adapter(location: str) -> Path:
    """Return the file of an adapter that is named by itself, its folder, a checkpoint or a stage of training.

    Raises:
        UserError: there is none.
    """
    path = typed_path(location)
    checkpoint = named_checkpoint(path)
    if checkpoint is not None and not checkpoint.has_adapters:
        raise UserError(f"LORA {path} is a checkpoint of a whole network, and no adapter: name it as FROM")
    try:
        return find_adapter_file(path if checkpoint is None else checkpoint.weights)
    except UserError as error:
        raise UserError(f"LORA: {error}") from None


def open_adapter(path: Path, network: PixArt) -> Adapter:
    """Return the adapter of a file, which must fit a network.

    Raises:
        UserError: it does not, or cannot be read.
    """
    try:
        adapter = read_adapter(path, network.config)
        require_fit(adapter, network)
    except UserError as error:
        raise UserError(f"LORA: {error}") from None
    return adapter

"""Files of control branches: diffusers' research folder, which is what we write, and PixArt-delta's own .pth.

diffusers has the branch in `examples/research_projects/pixart` alone: a `PixArtControlNetAdapterModel` beside a
`PixArtTransformer2DModel`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from pixart.belonging import METADATA, belonging_of, read_header
from pixart.branching import add_branch, new_branch
from pixart.layouts import Layout, control_diffusers_layout, control_original_layout, fitted, renamed
from pixart.model import PixArt, PixArtConfig
from pixart.tensor_files import read_weight_file
from pixart.transformer_config import DIFFUSERS_VERSION
from pixart.weight_files import WEIGHTS_NAME, read_json

CLASS_NAME = "PixArtControlNetAdapterModel"
CONFIG_NAME = "config.json"
FILE_NAMES = (f"{WEIGHTS_NAME}.safetensors", f"{WEIGHTS_NAME}.bin")
# In front of the branch's keys in PixArt-delta's files, and of its base's, which stand beside them.
ORIGINAL_PREFIX, ORIGINAL_BASE_PREFIX = "controlnet.", "base_model."
DIFFUSERS_PREFIX = "controlnet_blocks."
COPY_NUMBER = re.compile(r"(?:controlnet|controlnet_blocks)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class StoredBranch:
    """A control branch as a file has it.

    Attributes:
        path: of the file.
        num_copies: copies of blocks.
        weights: by our names, beside a network.
        belongs_to: what the file says of the weights that it was trained on, and by which maps; nothing of others'.
    """

    path: Path
    num_copies: int
    weights: Mapping[str, Tensor]
    belongs_to: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, network: PixArt) -> None:
        """Put the branch beside a network of the shape that it was read for, in place."""
        with torch.device("meta"):
            branch = new_branch(network.config, self.num_copies)
        branch.load_state_dict({name.removeprefix("control."): w for name, w in self.weights.items()}, assign=True)
        network.control = branch


def write_branch(
    folder: Path, weights: Mapping[str, Tensor], config: PixArtConfig, *, belongs_to: Mapping[str, Any]
) -> None:
    """Write a control branch as a folder of diffusers' research class.

    Args:
        folder: to write into.
        weights: by our names, those of a branch as a network has it.
        config: of that network.
        belongs_to: what a reader must know of the network and of the control images; JSON.
    """
    num_copies = count_copies(weights)
    tensors = renamed(weights, control_diffusers_layout(config, num_copies))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAMES[0]
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", METADATA: json.dumps(dict(belongs_to), sort_keys=True)})
    path.chmod(mode)  # safetensors makes a file of its own, which its owner alone may read
    said = {"_class_name": CLASS_NAME, "_diffusers_version": DIFFUSERS_VERSION, "num_layers": num_copies}
    (folder / CONFIG_NAME).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def original_branch(weights: Mapping[str, Tensor], config: PixArtConfig) -> dict[str, Tensor]:
    """Return a control branch's weights, given by our names, by those of PixArt-delta's .pth."""
    return renamed(weights, control_original_layout(config, count_copies(weights)))


def count_copies(weights: Mapping[str, Tensor]) -> int:
    """Return how many copies a branch has, of its weights by our names."""
    return len({name for name in weights if re.fullmatch(r"control\.after\.\d+\.weight", name)})


def read_branch(file: Path, config: PixArtConfig) -> StoredBranch:
    """Open the file of a control branch for a network of this shape: of diffusers' research class, or PixArt-delta's.

    Raises:
        UserError: it is no control branch, damaged, or of another base; names it.
    """
    tensors = read_weight_file(file).tensors
    if not is_branch(tensors):
        raise UserError(f"{file} is no control branch: it has no weights such as {ORIGINAL_PREFIX}0.after_proj.weight")
    theirs = {name: value for name, value in tensors.items() if not name.startswith(ORIGINAL_BASE_PREFIX)}
    numbers = [int(match[1]) for name in theirs if (match := COPY_NUMBER.match(name))]
    num_copies = 1 + max(numbers)
    said = _said_copies(file)
    if said not in (None, num_copies):
        raise UserError(f"{file.parent / CONFIG_NAME} says num_layers {said}, but {file.name} has {num_copies} copies")
    if num_copies >= config.num_layers:
        raise UserError(
            f"{file} is a control branch of {num_copies} copies, of another base: they feed the blocks behind the "
            f"first, and this {config.title} has {config.num_layers} blocks"
        )
    layout: Layout = (
        control_diffusers_layout(config, num_copies)
        if any(name.startswith(DIFFUSERS_PREFIX) for name in theirs)
        else control_original_layout(config, num_copies)
    )
    with torch.device("meta"):
        network = config.network()
        add_branch(network, num_copies, key=str(file))
    words = f"a control branch of {num_copies} copies beside a {config.title} of {config.num_layers} blocks"
    return StoredBranch(
        path=file,
        num_copies=num_copies,
        weights=fitted(network, theirs, layout, words=f"{words} of width {config.width}", where=str(file)),
        belongs_to=belonging_of(read_header(file), file),
    )


def infer_config(tensors: Mapping[str, Tensor], *, where: str) -> PixArtConfig:
    """Return a shape of a base that the branch of a file fits beside, for its names alone: it tells no heads nor depth.

    Raises:
        UserError: it is no branch; names `where`.
    """
    after = next((value for name, value in tensors.items() if name.endswith(".0.after_proj.weight")), None)
    if after is None:
        raise UserError(f"{where} is no control branch: it has no weights such as {ORIGINAL_PREFIX}0.after_proj.weight")
    matches = {name: match for name in tensors if (match := COPY_NUMBER.match(name))}
    marks = (".attn.sr.weight", ".attn1.compression.convolution.weight")
    return PixArtConfig(
        num_layers=max(int(match[1]) for match in matches.values()) + 2,
        num_heads=1,
        head_dim=len(after),
        adaln="single" if any(name.endswith("_block.scale_shift_table") for name in matches) else "per-block",
        kv_compressed_blocks=tuple(sorted(int(match[1]) for name, match in matches.items() if name.endswith(marks))),
    )


def is_branch(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the weights of a file are a control branch's, with or without its base beside them."""
    return any(name.startswith((ORIGINAL_PREFIX, DIFFUSERS_PREFIX)) for name in tensors)


def _said_copies(file: Path) -> int | None:
    """Return the number of copies that the config beside a file says; None of files without one."""
    config = file.parent / CONFIG_NAME
    if file.name not in FILE_NAMES or not config.is_file():
        return None
    content = read_json(config)
    if content.get("_class_name") != CLASS_NAME:
        raise UserError(f"{config} is of {content.get('_class_name')!r}, and no control branch ({CLASS_NAME})")
    return content.get("num_layers")

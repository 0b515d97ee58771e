"""Whether two names are of one text encoder or latent codec: by known aliases, else by what is in their files.

The same weights go by many names: hub ids, the folders of a pipeline, copies in another precision. A codec is known by
its encoder, since that makes the latents: decoders of one encoder may differ.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.weights import WEIGHT_FILE, model_folder
from errors import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

# Hub ids of the same weights, one line a model.
TEXT_ALIASES = (
    (
        "DeepFloyd/t5-v1_1-xxl",
        "google/t5-v1_1-xxl",
        "mcmonkey/google_t5-v1_1-xxl_encoderonly",
        "city96/t5-v1_1-xxl-encoder-bf16",
    ),
    ("google/flan-t5-xxl",),
)
# Of one encoder: the decoders of the first line differ, and the second of SDXL's has its activations scaled down.
VAE_ALIASES = (
    ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse"),
    ("stabilityai/sdxl-vae", "madebyollin/sdxl-vae-fp16-fix"),
)
# Of halves that two models may differ in and still give the same texts or latents.
OTHER_HALVES = ("decoder.", "lm_head.", "post_quant_conv.")
NUM_ROWS = 2  # that are compared of each tensor
# Of one number rounded to bfloat16 and another that is not, and what float16 makes of the smallest.
ROUNDING, SMALLEST = 2.0**-7, 1e-6
# Latents of one encoder whose activations are scaled differ by rounding, those of two by about their own size.
MAX_LATENT_ERROR = 0.2
TEST_PIXELS = 64


def is_same_text_encoder(names: Sequence[str], others: Sequence[str]) -> bool | None:
    """Whether one text encoder goes by all these names: hub ids, with `@` and a commit or not, or folders; None where
    nothing tells.

    The first pair of names that tells decides: names that are equal or known, else a few rows of the weights, where
    both are in folders or in the hub's cache.
    """
    return _decide(names, others, aliases=TEXT_ALIASES, compare=_have_same_rows)


def is_same_codec(names: Sequence[str], others: Sequence[str]) -> bool | None:
    """Whether the latents of two codecs are the same, see `is_same_text_encoder`; where weights differ, they encode."""
    return _decide(names, others, aliases=VAE_ALIASES, compare=_give_same_latents)


def _decide(
    names: Sequence[str],
    others: Sequence[str],
    *,
    aliases: Sequence[Sequence[str]],
    compare: Callable[[Path, Path], bool | None],
) -> bool | None:
    if set(names) & set(others):
        return True
    for name in names:
        for other in others:
            groups = [next((group for group in aliases if one in group), None) for one in (name, other)]
            if None not in groups:
                return groups[0] is groups[1]
            folders = [_folder(one) for one in (name, other)]
            if folders[0] is not None and folders[1] is not None:
                is_same = folders[0].samefile(folders[1]) or compare(folders[0], folders[1])
                if is_same is not None:
                    return is_same
    return None


def _folder(name: str) -> Path | None:
    """Return where the files of a folder or hub id are, which may name its commit as `id@commit`."""
    folder = model_folder(name)
    if folder is None and "@" in name:
        model, _, revision = name.rpartition("@")
        folder = model_folder(model, revision)
    return folder


def _have_same_rows(one: Path, other: Path) -> bool | None:
    """Whether the first rows of all tensors that both have are the same but for rounding; None if there are none."""
    import torch

    rows, others = (dict(_first_rows(folder)) for folder in (one, other))
    shared = sorted(rows.keys() & others.keys())
    if not shared:
        return None
    for name in shared:
        first, second = rows[name], others[name]
        if first.shape != second.shape:
            return False
        room = ROUNDING * torch.maximum(first.abs(), second.abs()) + SMALLEST
        if not bool(((first - second).abs() <= room).all()):
            return False
    return True


def _first_rows(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the first rows of a model's floating-point tensors, fp32, of the halves that count.

    A file that cannot be read has none: it may be one that was never fetched, of an encoder that nobody loads.
    """
    for path in sorted(folder.iterdir()):
        if WEIGHT_FILE.fullmatch(path.name):
            for name, rows in _rows_of_file(path):
                if rows.is_floating_point() and not name.startswith(OTHER_HALVES):
                    yield name, rows.float()


def _rows_of_file(path: Path) -> list[tuple[str, Tensor]]:
    from safetensors import SafetensorError

    try:
        return _rows_of_safetensors(path) if path.suffix == ".safetensors" else _rows_of_pickle(path)
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return []


def _rows_of_safetensors(path: Path) -> list[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        return [(name, part[:NUM_ROWS] if part.get_shape() else file.get_tensor(name)) for name, part in parts.items()]


def _rows_of_pickle(path: Path) -> list[tuple[str, Tensor]]:
    import torch

    is_mapped = zipfile.is_zipfile(path)  # files of before torch 1.6 are none, and have to be read whole
    stored: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    tensors = {name: tensor for name, tensor in stored.items() if isinstance(tensor, torch.Tensor)}
    return [(name, tensor[:NUM_ROWS] if tensor.ndim else tensor) for name, tensor in tensors.items()]


def _give_same_latents(one: Path, other: Path) -> bool | None:
    """Whether two codecs have the same encoder, or encoders that give the same latents of a test picture."""
    has_same_rows = _have_same_rows(one, other)
    if has_same_rows is not False:  # nothing is shared where one has no weights
        return has_same_rows
    import torch

    from encoders.opening import open_codec

    ramp = torch.linspace(-1, 1, TEST_PIXELS)
    waves = torch.sin(40 * ramp[:, None] * ramp)
    picture = torch.stack([ramp.expand(TEST_PIXELS, -1), ramp[:, None].expand(-1, TEST_PIXELS), waves])[None]
    means = [open_codec(str(folder)).encode(picture)[0] for folder in (one, other)]
    if means[0].shape != means[1].shape:
        return False
    error = (means[0] - means[1]).square().mean() / means[0].square().mean().clamp(min=1e-12)
    return bool(error.sqrt() < MAX_LATENT_ERROR)

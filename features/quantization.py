"""How a T5 embedding is stored: bfloat16, or 8 bits a value with one scale per token, and what that loses."""

# L tokens of a caption, D text width

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

# Largest value of each 8-bit type: the largest of a token is scaled to it.
LARGEST = {"float8_e4m3": 448.0, "int8": 127.0}
BILLION = 10**9


@dataclass(frozen=True, kw_only=True)
class StoredText:
    """An embedding as its tar member holds it: values [L, D], and float32 scale [L] for the 8-bit storages."""

    values: np.ndarray
    scale: np.ndarray | None

    @property
    def parts(self) -> list[np.ndarray]:
        """Its tensors, as the schema of the family lists them."""
        return [self.values] if self.scale is None else [self.values, self.scale]

    @property
    def nbytes(self) -> int:
        """Bytes of values and scale."""
        return sum(part.nbytes for part in self.parts)


def store_text(embedding: "torch.Tensor", storage: str) -> StoredText:
    """Return a finite embedding [L, D] as `features.text_storage` wants it.

    With 8 bits, value = stored * scale[token]. int8 has 255 even steps between a token's largest value and its
    negative, so its error is at most half a step; float8_e4m3 has 3 mantissa bits, so a value keeps 1/16 of itself or
    better unless it is 2^15 times smaller than the token's largest.
    """
    import torch

    if storage == "bfloat16":
        return StoredText(values=embedding.to(torch.bfloat16).view(torch.uint16).numpy(), scale=None)
    values = embedding.float()
    largest = values.abs().amax(dim=1)  # [L]
    # A token of zeros alone keeps them, whatever its scale.
    scale = torch.where(largest > 0, largest / LARGEST[storage], torch.ones_like(largest))
    scaled = values / scale[:, None]
    if storage == "int8":
        stored = scaled.round().clamp(-LARGEST[storage], LARGEST[storage]).to(torch.int8).numpy()
    else:
        # Division may round the largest value past the end of the type, which has no infinity but nan.
        limited = scaled.clamp(-LARGEST[storage], LARGEST[storage])
        stored = limited.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return StoredText(values=stored, scale=scale.numpy())


def restore_text(stored: StoredText, storage: str) -> "torch.Tensor":
    """Return the float32 embedding [L, D] that a reader of `stored` gets."""
    import torch

    if stored.scale is None:
        return torch.from_numpy(stored.values).view(torch.bfloat16).float()
    values = torch.from_numpy(stored.values)
    if storage == "float8_e4m3":
        values = values.view(torch.float8_e4m3fn)
    return values.float() * torch.from_numpy(stored.scale)[:, None]


def measure_error(embedding: "torch.Tensor", restored: "torch.Tensor") -> dict[str, int | float]:
    """Compare an embedding [L, D] with what is stored of it.

    Returns numbers that add up over captions to the same total in any order, so they are whole billionths:
    `squared_error_ppb` (squared error over squared norm), `cosine_distance_ppb` (1 - cosine, mean over tokens); and
    `max_error`, the largest error of a value as part of the largest value of its token.
    """
    import torch

    exact, found = embedding.double(), restored.double()
    error = found - exact
    squared = (error.square().sum() / exact.square().sum().clamp_min(1e-30)).item()
    cosine = torch.nn.functional.cosine_similarity(exact, found, dim=1).mean().item()
    peak = exact.abs().amax(dim=1).clamp_min(1e-30)
    return {
        "squared_error_ppb": round(squared * BILLION),
        "cosine_distance_ppb": round((1.0 - cosine) * BILLION),
        "max_error": round((error.abs().amax(dim=1) / peak).max().item(), 6),
    }


def summarize_storage(details: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Sum up what 8-bit storage saved and lost over the `details` of shards; None where text is stored in bfloat16.

    Returns `size` (of the same in bfloat16), `relative_rms_error` (root of the captions' mean of squared error over
    squared norm), `cosine` (mean over captions) and `max_error` (of a value, as part of its token's largest).
    """
    shards = [shard for shard in details if "stored_bytes" in shard]
    if not shards:
        return None
    totals = {name: sum(shard[name] for shard in shards) for name in shards[0] if not name.startswith("max_")}
    num_captions = totals["num_captions"]
    return {
        "size": round(totals["stored_bytes"] / totals["bfloat16_bytes"], 4),
        "relative_rms_error": round((totals["squared_error_ppb"] / BILLION / num_captions) ** 0.5, 6),
        "cosine": round(1.0 - totals["cosine_distance_ppb"] / BILLION / num_captions, 8),
        "max_error": max(shard["max_error"] for shard in shards),
    }

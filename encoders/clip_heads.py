"""Small heads over CLIP's embeddings of images, in the layouts that their makers published.

Each is known by the names of its weights. There are three kinds: one linear layer (`weight`, `bias`: LAION's aesthetic
predictor, version 1); `layers.<n>` (its version 2, linear or with ReLU, and LAION's NSFW head for ViT-H/14); and
`norm`, `linear_1`, … (LAION's NSFW heads for ViT-B/32 and ViT-L/14, ported to torch), which give a probability. All
were made for embeddings of unit length. LAION's watermark detector is no such head: it is an EfficientNet, which sees
images.
"""

# B images, D width of embeddings, H width of a layer

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.state_dicts import read_tensors
from encoders.weights import REPOSITORY, cached_hub_file
from errors import UserError
from pipelines.as_typed import typed_path

_NAMES_SHOWN = 4
# Places of the linear layers among those of an nn.Sequential, and after how many of them a ReLU stands.
_SEQUENTIAL = {
    (0, 2, 4, 6, 7): ("aesthetic predictor 2, linear", 0),
    (0, 3, 6, 9, 11): ("aesthetic predictor 2, ReLU", 4),
    (0, 3, 6, 9, 12, 15, 16): ("NSFW head for ViT-H/14", 5),
}
_KNOWN = (
    "weight and bias (aesthetic predictor 1), layers.<n>.weight and .bias with n = "
    + " or ".join("-".join(map(str, places)) for places in _SEQUENTIAL)
    + " (aesthetic predictor 2, NSFW head for ViT-H/14), or norm.mean, norm.variance and linear_<n> (NSFW head for "
    "ViT-B/32 and ViT-L/14)"
)


@dataclass(frozen=True, kw_only=True)
class ClipHead:
    """A head that is loaded; a pure function of numpy, the same for any batch.

    Attributes:
        layout: whose it is, in words.
        linear: weight [H, D] and bias [H] of each linear layer, float64.
        num_relu: after so many of the layers, from the first on, negative numbers become 0.
        norm: mean and deviation [D] that embeddings are standardised by before, or None.
        is_probability: whether the last number goes through a sigmoid.
    """

    layout: str
    linear: Sequence[tuple[np.ndarray, np.ndarray]]
    num_relu: int
    norm: tuple[np.ndarray, np.ndarray] | None = None
    is_probability: bool = False

    @property
    def width(self) -> int:
        """Width of the embeddings that it was made for."""
        return self.linear[0][0].shape[1]

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Return one number, float32 [B], for each embedding [B, D], which are brought to unit length."""
        # In float64, what an image is batched with does not reach the digits that are kept.
        states = embeddings.astype(np.float64)
        states /= np.linalg.norm(states, axis=1, keepdims=True)
        if self.norm is not None:
            mean, deviation = self.norm
            states = (states - mean) / deviation
        for place, (weight, bias) in enumerate(self.linear):
            states = states @ weight.T + bias
            if place < self.num_relu:
                states = np.maximum(states, 0)
        found = states[:, 0]
        if self.is_probability:
            found = 1 / (1 + np.exp(-found.clip(-700, 700)))
        return found.astype(np.float32)


def find_head(file: str, *, key: str) -> Path:
    """Return the file of a head: by path, relative to the working folder or the repository, or in the hub's cache.

    Raises:
        MissingFileError: it is in neither; names the `key`, and of a hub's file the line that fetches it.
    """
    places = (root / typed_path(file) for root in (Path(), REPOSITORY))
    return next((path for path in places if path.is_file()), None) or cached_hub_file(file, key=key)


def load_head(path: Path, *, key: str) -> ClipHead:
    """Load a head from a `.safetensors` or `.pth` file of weights by name; runs no code of it.

    Raises:
        UserError: it is no such file, or of no known layout, or its shapes do not fit together; names the recipe `key`.
    """
    origin = f"{key} = {str(path)!r}"
    weights = {
        name: tensor.double().numpy() for name, tensor in read_tensors(path, origin=origin, wanted="a head's").items()
    }
    names = _linear_names(weights)
    if names is None:
        raise UserError(f"{origin} holds {_shown(weights)}, which is no known layout of a head; known are {_KNOWN}")
    linear = [(weights[f"{name}weight"], weights[f"{name}bias"]) for name in names]
    _require_chain(names, linear, origin=origin)
    if len(names) == 1 and not names[0]:
        return ClipHead(layout="aesthetic predictor 1", linear=linear, num_relu=0)
    if "norm.mean" not in weights:
        layout, num_relu = _SEQUENTIAL[tuple(int(name.split(".")[1]) for name in names)]
        return ClipHead(layout=layout, linear=linear, num_relu=num_relu)
    mean, variance = weights["norm.mean"], weights["norm.variance"]
    width = linear[0][0].shape[1]
    if mean.size != width or variance.size != width:
        shapes = f"norm.mean {list(mean.shape)}, norm.variance {list(variance.shape)}, {names[0]}weight [., {width}]"
        raise UserError(f"{origin} has shapes that do not fit together: {shapes}")
    return ClipHead(
        layout="NSFW head",
        linear=linear,
        num_relu=len(linear) - 1,
        norm=(mean.ravel(), np.sqrt(variance.ravel()) + 1e-10),
        is_probability=True,
    )


def _linear_names(weights: Mapping[str, np.ndarray]) -> list[str] | None:
    """Return what stands before `weight` and `bias` of the linear layers, in order; None for an unknown layout."""
    norm = {"norm.mean", "norm.variance"} & weights.keys()
    names = {name.removesuffix("weight") for name in weights if name.endswith("weight")}
    if weights.keys() - norm != {name + part for name in names for part in ("weight", "bias")}:
        return None
    if not norm:
        layouts = [[""], *([f"layers.{place}." for place in places] for places in _SEQUENTIAL)]
        return next((layout for layout in layouts if set(layout) == names), None)
    in_order = [f"linear_{number}." for number in range(1, len(names) + 1)]
    return in_order if names and len(norm) == 2 and set(in_order) == names else None


def _require_chain(names: Sequence[str], linear: Sequence[tuple[np.ndarray, np.ndarray]], *, origin: str) -> None:
    """Check that each layer reads what the one before it gives, and that the last one gives one number."""
    for place, (name, (weight, bias)) in enumerate(zip(names, linear, strict=True)):
        is_last = place == len(names) - 1
        num_next = 1 if is_last else linear[place + 1][0].shape[-1]
        if weight.ndim != 2 or weight.shape[0] != num_next or bias.shape != weight.shape[:1]:
            after = "the last layer, which gives 1 number" if is_last else f"one before a layer that reads {num_next}"
            shapes = f"{name}weight {list(weight.shape)}, {name}bias {list(bias.shape)}"
            raise UserError(f"{origin} has shapes that do not fit together: {shapes} of {after}")


def _shown(weights: Mapping[str, np.ndarray]) -> str:
    shown = [f"{name} {list(array.shape)}" for name, array in sorted(weights.items())]
    more = f" and {len(shown) - _NAMES_SHOWN:,} more" if len(shown) > _NAMES_SHOWN else ""
    return ", ".join(shown[:_NAMES_SHOWN]) + more if shown else "nothing"

"""A micro-batch: in host memory as its payloads lie in the tars, and on the device as the model wants it."""

# B samples of a micro-batch, C latent channels, h x w latent size, H x W pixels
# T tokens of all its captions, D text width

import contextlib
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pixart.model import PackedText

# Tokens that a batch of captions is filled up to a multiple of.
TOKENS_MULTIPLE = 256
LENGTH_MULTIPLE = 128
# Of `tensors`, where pixels lead.
PIXEL_TENSOR = "pixels.pixels"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of a rank, on its device; on a CPU its tensors are valid until the reader is asked for the next.

    Attributes:
        step: optimizer step it belongs to, counted from 0.
        bucket: `HxW` in pixels.
        keys, shards: of the samples, and the names of the shards they lie in.
        mean, std: of the codec's posterior, unscaled, fp16 [B, C, h, w]; std is None where the codec has none. Where
            pixels lead there are no latents, and mean and noise are [B, 0, 0, 0].
        posterior_noise, noise: standard normal, fp32 [B, C, h, w]; the first is None without std.
        timestep_draws: uniform in [0, 1), float64 [B].
        is_dropped: whether the condition is the null one, [B]; `text` already holds the null caption there.
        is_prior: whether a sample is of a dataset with role prior, [B].
        size: original height and width of each image in pixels, and the aspect ratio height / width of its bucket,
            rounded to the two digits of PixArt's bucket tables, fp32 [B, 3]; -1 for a side that is not known.
        text: captions end to end, bf16 [T, D]; None in stage 1.
        labels: class labels, int64 [B]; None in stages 2 and 3.
        tensors: of every family but latents: `<family>.<tensor>`, as `pixels.pixels`, uint8 [B, 3, H, W].
        texts: of every other family of rows of different lengths, as `text` is.
    """

    step: int
    bucket: str
    keys: list[str]
    shards: list[str]
    mean: Tensor
    std: Tensor | None
    posterior_noise: Tensor | None
    noise: Tensor
    timestep_draws: Tensor
    is_dropped: Tensor
    is_prior: Tensor
    size: Tensor
    text: PackedText | None
    labels: Tensor | None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Mapping[str, PackedText] = field(default_factory=dict)

    def device_tensors(self) -> list[Tensor]:
        """Return all its tensors."""
        found = tree_leaves([getattr(self, each.name) for each in fields(self)])
        return [value for value in found if isinstance(value, Tensor)]

    def draw_latents(self) -> Tensor:
        """Return latents drawn from the posterior, unscaled, fp32 [B, C, h, w]: its mean where it has no std."""
        if self.std is None or self.posterior_noise is None:
            return self.mean.float()
        return self.mean.float() + self.std.float() * self.posterior_noise


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Rows of different lengths, such as captions, end to end as they are stored; dropped ones are left out.

    Attributes:
        values: bf16, float8_e4m3 or int8, [T, D].
        scale: of each token, fp32 [T], for the 8-bit ones: value = stored * scale.
        lengths: tokens of each sample's row, [B]; of a dropped one those of the null caption.
        is_dropped: [B].
        null: the null caption, bf16 [tokens, D].
    """

    values: Tensor
    scale: Tensor | None
    lengths: Tensor
    is_dropped: Tensor
    null: Tensor

    def to(self, device: torch.device) -> PackedText:
        """Return the captions in bf16 end to end, the null caption in place of dropped ones.

        Zeros follow up to a multiple of `TOKENS_MULTIPLE`, so that shapes repeat; on a GPU, whose code is compiled for
        it, the bound on a caption's length is rounded up to `LENGTH_MULTIPLE`.
        """

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        offsets = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))  # on the host, as all indices
        num_tokens, is_null = int(offsets[-1]), self.is_dropped.repeat_interleave(self.lengths)
        stored = copy(self.values)
        if self.scale is not None:
            stored = (stored.float() * copy(self.scale)[:, None]).bfloat16()
        text = stored.new_empty(-(-num_tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE, stored.shape[1])
        text[num_tokens:].zero_()
        text.index_copy_(0, copy((~is_null).nonzero().squeeze(1)), stored)
        places = copy(is_null.nonzero().view(-1, len(self.null)))  # [dropped, tokens]
        text[places] = copy(self.null)
        multiple = LENGTH_MULTIPLE if device.type == "cuda" else 1
        return PackedText(text, copy(offsets.int()), -(-int(self.lengths.max()) // multiple) * multiple)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch of a rank in the reader's buffers, as `Batch` says but for its texts; `to` gives the batch."""

    step: int
    bucket: str
    keys: list[str]
    shards: list[str]
    mean: Tensor
    std: Tensor | None
    posterior_noise: Tensor | None
    noise: Tensor
    timestep_draws: Tensor
    is_dropped: Tensor
    is_prior: Tensor
    size: Tensor
    text: PackedRows | None
    labels: Tensor | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    texts: dict[str, PackedRows] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of what leads: of latents, or of pixels where there are none."""
        leading = self.tensors[PIXEL_TENSOR] if self.mean.numel() == 0 else self.mean
        return leading.shape[2], leading.shape[3]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; the copies of pinned buffers are only queued, on the current stream."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            step=self.step,
            bucket=self.bucket,
            keys=self.keys,
            shards=self.shards,
            mean=copy(self.mean),
            std=None if self.std is None else copy(self.std),
            posterior_noise=None if self.posterior_noise is None else copy(self.posterior_noise),
            noise=copy(self.noise),
            timestep_draws=copy(self.timestep_draws),
            is_dropped=copy(self.is_dropped),
            is_prior=copy(self.is_prior),
            size=copy(self.size),
            text=None if self.text is None else self.text.to(device),
            labels=None if self.labels is None else copy(self.labels),
            tensors={name: copy(tensor) for name, tensor in self.tensors.items()},
            texts={name: rows.to(device) for name, rows in self.texts.items()},
        )


class Buffers:
    """Memory of one micro-batch: each tensor's grows to its largest shape and is then used again and again."""

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """Return a tensor of `shape` that holds whatever it held before."""
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            # Captions differ in length from batch to batch; a little room to spare saves most of the growing.
            memory = self._memory[name] = self._allocate(size + size // 8, dtype)
        return memory[:size].view(shape)

    def _allocate(self, size: int, dtype: torch.dtype) -> Tensor:
        if self._is_pinned or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size, dtype=dtype, pin_memory=self._is_pinned)
        # On huge pages a copy of a batch takes a quarter less time; torch does not ask for them.
        memory = mmap.mmap(-1, max(1, size) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype)

"""A micro-batch: payload bytes copied from mapped tars straight into its buffers, and its samples' random numbers.

The random numbers of a sample depend on (seed, stage, step, position in the global batch) alone: neither world size,
nor gradient accumulation, nor a resume changes them.
"""

# B samples of a micro-batch, C latent channels, h x w latent size, L text tokens, D text width

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.feature_store import NULL_CAPTION_FILE, read_payload
from training.data.index import FeatureIndex, ShardTable
from training.data.plan import PlannedBatch

NUM_OPEN_TARS = 512


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of a rank; its tensors are valid until the reader is asked for the next.

    Attributes:
        step: optimizer step it belongs to, counted from 0.
        bucket: `HxW` in pixels.
        keys: of the samples.
        mean, std: of the VAE's posterior, unscaled, fp16 [B, C, h, w].
        posterior_noise, noise: standard normal, fp32 [B, C, h, w].
        timestep_draws: uniform in [0, 1), float64 [B].
        is_dropped: whether the condition is the null one, [B]; `text` already holds the null caption there.
        text: bf16 [B, L, D], zero behind a caption's end; None in stage 1.
        text_mask: True at real tokens, [B, L]; None in stage 1.
        labels: class labels, int64 [B]; None in stages 2 and 3.
    """

    step: int
    bucket: str
    keys: list[str]
    mean: Tensor
    std: Tensor
    posterior_noise: Tensor
    noise: Tensor
    timestep_draws: Tensor
    is_dropped: Tensor
    text: Tensor | None
    text_mask: Tensor | None
    labels: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`."""
        if device.type == "cpu":
            return self
        # Blocking copies: the buffers are filled again as soon as the loop asks for the next batch.
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


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
            memory = self._memory[name] = torch.empty(size, dtype=dtype, pin_memory=self._is_pinned)
        return memory[:size].view(shape)


class SampleRandom:
    """A counter-based generator that can be put at any (step, position)."""

    def __init__(self, seed: int, stage: int) -> None:
        self._bits = np.random.Philox(key=[seed, stage])
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, step: int, position: int) -> np.random.Generator:
        """Return the generator at the start of a sample's numbers, 2^128 draws away from any other sample's."""
        self._state["state"]["counter"][:] = (0, 0, position, step)
        self._bits.state = self._state
        return self._generator


class BatchAssembler:
    """Turns planned samples into batches.

    Args:
        index: where the payloads are.
        buckets: names by the plan's bucket numbers.
        seed, stage: of the random numbers.
        caption_dropout: probability that a sample's condition becomes the null one.

    Raises:
        FileNotFoundError: the text directory has no null caption.
    """

    def __init__(
        self, index: FeatureIndex, *, buckets: list[str], seed: int, stage: int, caption_dropout: float
    ) -> None:
        self._index = index
        self._buckets = buckets
        self._caption_dropout = caption_dropout
        self._random = SampleRandom(seed, stage)
        self._tar = lru_cache(maxsize=NUM_OPEN_TARS)(self._map_tar)
        self._null_text = None if index.text is None else _load_null_text(index.text)

    def assemble(self, buffers: Buffers, planned: PlannedBatch, positions: range) -> Batch:
        """Return the batch of the samples at `positions` of the planned global batch.

        Raises:
            ValueError: a tar is shorter than its index says, or shapes differ in a bucket; names shard and key.
        """
        bucket = self._buckets[planned.bucket]
        part = slice(positions.start, positions.stop)
        shards = planned.shards[part].tolist()
        tables = [self._index.table(shard) for shard in shards]
        rows = [
            table.row(bucket, ordinal) for table, ordinal in zip(tables, planned.ordinals[part].tolist(), strict=True)
        ]
        samples = list(zip(shards, tables, rows, strict=True))
        keys = [table.keys[row].as_py() for table, row in zip(tables, rows, strict=True)]

        first, row = tables[0], rows[0]
        shape = (len(rows), int(first.channels[row]), int(first.heights[row]), int(first.widths[row]))  # [B, C, h, w]
        moments = [buffers.take(name, shape, dtype=torch.float16) for name in ("mean", "std")]
        noises = [buffers.take(name, shape, dtype=torch.float32) for name in ("posterior", "noise")]
        draws = self._draw(planned.step, positions, noises)  # [B, 3]
        is_dropped = draws[:, 0] < self._caption_dropout
        self._read_latents(samples, keys, moments)
        text, text_mask, labels = None, None, None
        if self._null_text is not None:
            text, text_mask = self._read_text(buffers, samples, keys, choices=draws[:, 1], is_dropped=is_dropped)
        else:
            labels = torch.tensor([int(table.labels[row]) for table, row in zip(tables, rows, strict=True)])
        return Batch(
            step=planned.step,
            bucket=bucket,
            keys=keys,
            mean=moments[0],
            std=moments[1],
            posterior_noise=noises[0],
            noise=noises[1],
            timestep_draws=torch.from_numpy(draws[:, 2].copy()),
            is_dropped=torch.from_numpy(is_dropped),
            text=text,
            text_mask=text_mask,
            labels=labels,
        )

    def _draw(self, step: int, positions: range, noises: list[Tensor]) -> np.ndarray:
        """Fill `noises` with normal numbers; returns uniform ones [B, 3]: dropout, caption, timestep."""
        draws = np.empty((len(positions), 3))
        arrays = [noise.numpy() for noise in noises]
        for i, position in enumerate(positions):
            generator = self._random.at(step, position)
            generator.random(out=draws[i])
            for array in arrays:
                generator.standard_normal(out=array[i], dtype=np.float32)
        return draws

    def _read_latents(self, samples: list[tuple[int, ShardTable, int]], keys: list[str], moments: list[Tensor]) -> None:
        mean, std = (moment.numpy() for moment in moments)
        for i, (shard, table, row) in enumerate(samples):
            shape = (int(table.channels[row]), int(table.heights[row]), int(table.widths[row]))
            if shape != mean.shape[1:]:
                raise ValueError(
                    f"shard {self._index.shards[shard]}: latents of {keys[i]} are {shape}, "
                    f"but {mean.shape[1:]} in other samples of the same bucket"
                )
            tar = self._tar(self._index.latents, shard)
            for moment, offset in ((mean, table.mean_offsets[row]), (std, table.std_offsets[row])):
                moment[i] = self._payload(shard, tar, int(offset), key=keys[i], dtype="float16", shape=shape)

    def _read_text(
        self,
        buffers: Buffers,
        samples: list[tuple[int, ShardTable, int]],
        keys: list[str],
        *,
        choices: np.ndarray,
        is_dropped: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        """Return the captions [B, L, D], padded to the longest of this batch, and the mask of their tokens [B, L]."""
        assert self._null_text is not None
        assert self._index.text is not None
        width = self._null_text.shape[1]
        payloads = []
        for i, (shard, table, row) in enumerate(samples):
            if is_dropped[i]:
                payloads.append(self._null_text)
                continue
            caption = table.choose_caption(row, float(choices[i]))
            tar = self._tar(self._index.text, shard)
            shape = (int(table.caption_tokens[caption]), width)
            offset = int(table.caption_offsets[caption])
            payloads.append(self._payload(shard, tar, offset, key=keys[i], dtype="uint16", shape=shape))
        lengths = [len(payload) for payload in payloads]
        text = buffers.take("text", (len(payloads), max(lengths), width), dtype=torch.bfloat16)
        bits = text.view(torch.uint16).numpy()
        for i, payload in enumerate(payloads):
            bits[i, : lengths[i]] = payload
            bits[i, lengths[i] :] = 0
        return text, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def _map_tar(self, directory: Path, shard: int) -> np.ndarray:
        # A plain view: slices of np.memmap itself are several times slower to make.
        return np.asarray(np.memmap(directory / f"{self._index.shards[shard]}.tar", np.uint8, mode="r"))

    def _payload(
        self, shard: int, tar: np.ndarray, offset: int, *, key: str, dtype: str, shape: tuple[int, ...]
    ) -> np.ndarray:
        end = offset + math.prod(shape) * 2
        if end > len(tar):
            raise ValueError(
                f"shard {self._index.shards[shard]}: sample {key} ends at byte {end}, but its tar has {len(tar)}; "
                "the tar was cut short, make its features again"
            )
        return read_payload(tar, offset, dtype=dtype, shape=shape)


def _load_null_text(directory: Path) -> np.ndarray:
    """Return the raw bfloat16 bits of the null caption, uint16 [L, D]."""
    (tensor,) = load_file(directory / NULL_CAPTION_FILE).values()
    return tensor.contiguous().view(torch.uint16).numpy()

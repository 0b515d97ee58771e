"""Fills a micro-batch: payload bytes copied from mapped tars straight into its buffers, and its random numbers.

The random numbers of a sample depend on (seed, stage, step, position in the global batch) alone: neither world size,
nor gradient accumulation, nor a resume changes them.
"""

# B samples of a micro-batch, C latent channels, h x w latent size, T tokens of all its captions, D text width

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from pipelines.feature_store import NULL_CAPTION_FILE
from training.data.batch import Buffers, PackedBatch, PackedText
from training.data.features import Dataset
from training.data.index import NOT_THERE, OpenShard
from training.data.plan import PlannedBatch

# How captions are stored; the 8-bit ones have a scale per token.
TEXT_DTYPES = {"bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
SCALE_BYTES = 4


@dataclass(frozen=True)
class LocatedSample:
    """A sample to read: its row in its shard's table, and its caption; None if that is dropped or there is no text."""

    key: str
    shard: OpenShard
    row: int
    caption: int | None


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
        dataset: a dataset of the stage; how captions are stored, and the null caption, are the same in all.
        buckets: names by the plan's bucket numbers.
        seed, stage: of the random numbers.
        caption_dropout: probability that a sample's condition becomes the null one.
        checks_payloads: whether the CRC-32 of what is read is compared with the index.

    Raises:
        FileNotFoundError: the text directory has no null caption.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        buckets: list[str],
        seed: int,
        stage: int,
        caption_dropout: float,
        checks_payloads: bool = False,
    ) -> None:
        self._buckets = buckets
        self._caption_dropout = caption_dropout
        self._checks_payloads = checks_payloads
        self._random = SampleRandom(seed, stage)
        self._null_text: Tensor | None = None
        if dataset.text is not None:
            (self._null_text,) = load(dataset.text.read_bytes(NULL_CAPTION_FILE)).values()
            storage = dataset.text.manifest.extra["text"].get("storage", "bfloat16")
            self._text_dtype = TEXT_DTYPES[storage]
            self._has_scale = storage != "bfloat16"

    def assemble(
        self, buffers: Buffers, planned: PlannedBatch, positions: range, shards: Mapping[int, OpenShard]
    ) -> PackedBatch:
        """Return the batch of the samples at `positions` of the planned global batch, all of whose `shards` are open.

        Raises:
            ValueError: a tar is shorter than its index says, bytes have changed, or shapes differ in a bucket; names
                shard and key.
        """
        part = slice(positions.start, positions.stop)
        tables = [shards[shard] for shard in planned.shards[part].tolist()]
        bucket = self._buckets[planned.bucket]
        rows = [
            shard.table.first_rows[bucket] + ordinal
            for shard, ordinal in zip(tables, planned.ordinals[part].tolist(), strict=True)
        ]
        shape = (len(rows), *tables[0].table.latent_shape(rows[0]))  # [B, C, h, w]
        noises = [buffers.take(name, shape, dtype=torch.float32) for name in ("posterior", "noise")]
        draws = self._draw(planned.step, positions, noises)  # [B, 3]
        is_dropped = draws[:, 0] < self._caption_dropout
        samples = [
            locate_sample(shard, row, draw=draw, is_dropped=dropped)
            for shard, row, draw, dropped in zip(tables, rows, draws[:, 1].tolist(), is_dropped.tolist(), strict=True)
        ]
        mean, std = self.read_latents(buffers, samples)
        labels = torch.tensor([int(sample.shard.table.labels[sample.row]) for sample in samples])
        return PackedBatch(
            step=planned.step,
            bucket=bucket,
            keys=[sample.key for sample in samples],
            mean=mean,
            std=std,
            posterior_noise=noises[0],
            noise=noises[1],
            timestep_draws=torch.from_numpy(draws[:, 2].copy()),
            is_dropped=torch.from_numpy(is_dropped),
            text=None if self._null_text is None else self.read_text(buffers, samples),
            labels=labels if self._null_text is None else None,
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

    def read_latents(self, buffers: Buffers, samples: Sequence[LocatedSample]) -> tuple[Tensor, Tensor]:
        """Copy mean and std of `samples` into `buffers`, each [B, C, h, w]."""
        first = samples[0].shard.table.latent_shape(samples[0].row)
        moments = [buffers.take(name, (len(samples), *first), dtype=torch.float16) for name in ("mean", "std")]
        means, stds = (moment.numpy().view(np.uint8).reshape(len(samples), -1) for moment in moments)
        for i, sample in enumerate(samples):
            table, row = sample.shard.table, sample.row
            shape = table.latent_shape(row)
            if shape != first:
                raise ValueError(
                    f"shard {table.name}: latents of {sample.key} are {shape}, but {first} in other samples of the "
                    "same bucket"
                )
            _copy(sample, sample.shard.latents, int(table.mean_offsets[row]), means[i])
            _copy(sample, sample.shard.latents, int(table.std_offsets[row]), stds[i])
            if self._checks_payloads:
                _check(sample, "latents", zlib.crc32(stds[i], zlib.crc32(means[i])), int(table.latent_crcs[row]))
        return moments[0], moments[1]

    def read_text(self, buffers: Buffers, samples: Sequence[LocatedSample]) -> PackedText:
        """Copy the captions of `samples` into `buffers` end to end, as they are stored."""
        assert self._null_text is not None
        chosen = [sample for sample in samples if sample.caption is not None]
        tokens = [int(sample.shard.table.caption_tokens[sample.caption]) for sample in chosen]
        width = self._null_text.shape[1]
        values = buffers.take("text", (sum(tokens), width), dtype=self._text_dtype)
        flat_values = values.view(torch.uint8).numpy().reshape(-1)
        scale = buffers.take("scale", (sum(tokens),), dtype=torch.float32) if self._has_scale else None
        flat_scale = np.zeros(0, np.uint8) if scale is None else scale.numpy().view(np.uint8)
        token_bytes = width * values.element_size()
        start = 0
        for sample, num_tokens in zip(chosen, tokens, strict=True):
            table, tar = sample.shard.table, sample.shard.text
            assert tar is not None
            payload = flat_values[start * token_bytes : (start + num_tokens) * token_bytes]
            _copy(sample, tar, int(table.caption_offsets[sample.caption]), payload)
            scales = flat_scale[start * SCALE_BYTES : (start + num_tokens) * SCALE_BYTES]
            if self._has_scale:
                _copy(sample, tar, int(table.scale_offsets[sample.caption]), scales)
            if self._checks_payloads:
                crc = zlib.crc32(scales, zlib.crc32(payload))
                _check(sample, "a caption", crc, int(table.caption_crcs[sample.caption]))
            start += num_tokens
        is_dropped = torch.tensor([sample.caption is None for sample in samples])
        lengths = torch.full((len(samples),), len(self._null_text))
        lengths[~is_dropped] = torch.tensor(tokens, dtype=torch.long)
        return PackedText(values=values, scale=scale, lengths=lengths, is_dropped=is_dropped, null=self._null_text)


def locate_sample(shard: OpenShard, row: int, *, draw: float, is_dropped: bool) -> LocatedSample:
    """Return the sample in a row of a shard, with the caption that the uniform number `draw` in [0, 1) picks."""
    has_caption = shard.text is not None and not is_dropped
    caption = shard.table.choose_caption(row, draw) if has_caption else None
    return LocatedSample(shard.table.keys[row].as_py(), shard, row, caption)


def _copy(sample: LocatedSample, tar: np.ndarray, offset: int, target: np.ndarray) -> None:
    end = offset + len(target)
    if end > len(tar):
        raise ValueError(
            f"shard {sample.shard.table.name}: sample {sample.key} ends at byte {end}, but its tar has {len(tar)}; "
            "the tar was cut short, make its features again"
        )
    target[:] = tar[offset:end]


def _check(sample: LocatedSample, what: str, found: int, expected: int) -> None:
    if found != expected:
        has = "has no checksum" if expected == NOT_THERE else f"has CRC-32 {expected:08x}"
        raise ValueError(
            f"shard {sample.shard.table.name}: {what} of sample {sample.key} {has} in the index, but {found:08x} was "
            "read; the tar was changed or damaged, make its features again (training.check_payloads looks for this)"
        )

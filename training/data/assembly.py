"""Fills a micro-batch: payload bytes copied from mapped tars straight into its buffers, and its random numbers.

The random numbers of a sample depend on (seed, stage, step, position in the global batch) alone: neither world size,
nor gradient accumulation, nor a resume changes them.
"""

# B samples of a micro-batch, C latent channels, h x w latent size, T tokens of all its captions, D text width

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from pipelines.store.families import NULL_CAPTION_FILE
from pipelines.store.feature_store import payload_crc32
from training.data.batch import Buffers, PackedBatch, PackedText
from training.data.features import Dataset
from training.data.index import CAPTION_NUMBERS, LATENT_NUMBERS, NOT_THERE, OpenShard
from training.data.plan import PlannedBatch

# How captions are stored; the 8-bit ones have a scale per token.
TEXT_DTYPES = {"bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
SCALE_BYTES = 4
LATENT_SHAPE = [LATENT_NUMBERS.index(name) for name in ("channels", "height", "width")]


@dataclass(frozen=True, kw_only=True)
class LocatedSamples:
    """Samples of a micro-batch and where their payloads are.

    Attributes:
        keys: [B].
        shards: each sample's, open, [B].
        latents: columns `LATENT_NUMBERS`, [B, 6].
        captions: columns `CAPTION_NUMBERS` of the caption chosen for each sample, [B, 4]; zeros without text.
        labels: [B].
    """

    keys: list[str]
    shards: list[OpenShard]
    latents: np.ndarray
    captions: np.ndarray
    labels: np.ndarray


def locate_samples(
    planned: PlannedBatch, positions: range, shards: Mapping[int, OpenShard], *, bucket: str, draws: np.ndarray
) -> LocatedSamples:
    """Look up the samples at `positions` of a global batch; uniform numbers `draws` [B] choose their captions."""
    part = slice(positions.start, positions.stop)
    numbers, ordinals = planned.shards[part], planned.ordinals[part]
    order = np.argsort(numbers, kind="stable")
    latents = np.empty((len(order), len(LATENT_NUMBERS)), dtype=np.int64)
    captions = np.zeros((len(order), len(CAPTION_NUMBERS)), dtype=np.int64)
    keys, labels = np.empty(len(order), dtype=object), np.empty(len(order), dtype=np.int64)
    cuts = np.flatnonzero(np.diff(numbers[order])) + 1
    for mine in np.split(order, cuts):
        shard = shards[int(numbers[mine[0]])]
        table, rows = shard.table, shard.table.first_rows[bucket] + ordinals[mine]
        keys[mine], latents[mine], labels[mine] = table.keys[rows], table.latents[rows], table.labels[rows]
        if shard.text is not None:
            captions[mine] = table.captions[table.choose_captions(rows, draws[mine])]
    return LocatedSamples(
        keys=keys.tolist(),
        shards=[shards[number] for number in numbers.tolist()],
        latents=latents,
        captions=captions,
        labels=labels,
    )


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
        bucket = self._buckets[planned.bucket]
        first = shards[int(planned.shards[positions.start])].table
        row = first.first_rows[bucket] + int(planned.ordinals[positions.start])
        shape = (len(positions), *first.latents[row, LATENT_SHAPE].tolist())  # [B, C, h, w]
        noises = [buffers.take(name, shape, dtype=torch.float32) for name in ("posterior", "noise")]
        draws = self._draw(planned.step, positions, noises)  # [B, 3]
        is_dropped = draws[:, 0] < self._caption_dropout
        samples = locate_samples(planned, positions, shards, bucket=bucket, draws=draws[:, 1])
        mean, std = self.read_latents(buffers, samples)
        return PackedBatch(
            step=planned.step,
            bucket=bucket,
            keys=samples.keys,
            mean=mean,
            std=std,
            posterior_noise=noises[0],
            noise=noises[1],
            timestep_draws=torch.from_numpy(draws[:, 2].copy()),
            is_dropped=torch.from_numpy(is_dropped),
            text=None if self._null_text is None else self.read_text(buffers, samples, is_dropped=is_dropped),
            labels=torch.from_numpy(samples.labels) if self._null_text is None else None,
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

    def read_latents(self, buffers: Buffers, samples: LocatedSamples) -> tuple[Tensor, Tensor]:
        """Copy mean and std of `samples` into `buffers`, each [B, C, h, w]."""
        shapes = samples.latents[:, LATENT_SHAPE]
        if (odd := np.flatnonzero((shapes != shapes[0]).any(axis=1))).size:
            i = int(odd[0])
            raise ValueError(
                f"shard {samples.shards[i].table.name}: latents of {samples.keys[i]} are {tuple(shapes[i].tolist())}, "
                f"but {tuple(shapes[0].tolist())} in other samples of the same bucket"
            )
        shape = (len(shapes), *shapes[0].tolist())
        moments = [buffers.take(name, shape, dtype=torch.float16) for name in ("mean", "std")]
        targets = [moment.numpy().view(np.uint8).reshape(len(shapes), -1) for moment in moments]
        tars = [shard.latents for shard in samples.shards]
        for target, offsets in zip(targets, samples.latents.T, strict=False):
            starts = np.arange(len(target) + 1) * target.shape[1]
            _copy(tars, offsets, target.reshape(-1), starts, samples)
        if self._checks_payloads:
            found = [payload_crc32(mean, std) for mean, std in zip(*targets, strict=True)]
            _check_crcs(samples, "latents", found, samples.latents[:, LATENT_NUMBERS.index("crc32")])
        return moments[0], moments[1]

    def read_text(self, buffers: Buffers, samples: LocatedSamples, *, is_dropped: np.ndarray) -> PackedText:
        """Copy the captions of `samples` into `buffers` end to end, as they are stored, those left out that dropped."""
        assert self._null_text is not None
        tokens = np.where(is_dropped, 0, samples.captions[:, CAPTION_NUMBERS.index("num_tokens")])
        ends = np.concatenate([[0], np.cumsum(tokens)])
        num_tokens, width = int(ends[-1]), self._null_text.shape[1]
        values = buffers.take("text", (num_tokens, width), dtype=self._text_dtype)
        targets = [(values.view(torch.uint8).numpy().reshape(-1), ends * width * values.element_size())]
        scale = None
        if self._has_scale:
            scale = buffers.take("scale", (num_tokens,), dtype=torch.float32)
            targets.append((scale.numpy().view(np.uint8), ends * SCALE_BYTES))
        tars = [shard.text for shard in samples.shards if shard.text is not None]
        for (target, starts), offsets in zip(targets, samples.captions.T, strict=False):
            _copy(tars, offsets, target, starts, samples)
        if self._checks_payloads:
            parts = [np.split(target, starts[1:-1]) for target, starts in targets]
            found = [payload_crc32(*payloads) for payloads in zip(*parts, strict=True)]
            expected = np.where(is_dropped, 0, samples.captions[:, CAPTION_NUMBERS.index("crc32")])
            _check_crcs(samples, "a caption", found, expected)
        lengths = np.where(is_dropped, len(self._null_text), tokens)
        return PackedText(
            values=values,
            scale=scale,
            lengths=torch.from_numpy(lengths),
            is_dropped=torch.from_numpy(is_dropped),
            null=self._null_text,
        )


def _copy(
    tars: Sequence[np.ndarray], offsets: np.ndarray, target: np.ndarray, starts: np.ndarray, samples: LocatedSamples
) -> None:
    """Copy bytes at `offsets` [B] of mapped tars to [starts[i], starts[i + 1]) of `target`."""
    sizes = np.diff(starts)
    # Nothing but slices in this loop: each copy sweeps the processor's caches, so all else in it would run cold.
    rows = zip(tars, offsets.tolist(), (offsets + sizes).tolist(), starts.tolist(), starts[1:].tolist(), strict=False)
    for i, (tar, offset, end, start, stop) in enumerate(rows):
        if end > len(tar):
            raise ValueError(
                f"shard {samples.shards[i].table.name}: sample {samples.keys[i]} ends at byte {end}, but its tar has "
                f"{len(tar)}; the tar was cut short, make its features again"
            )
        target[start:stop] = tar[offset:end]


def _check_crcs(samples: LocatedSamples, what: str, found: Sequence[int], expected: np.ndarray) -> None:
    for i, (crc, wanted) in enumerate(zip(found, expected.tolist(), strict=True)):
        if crc != wanted:
            has = "has no checksum" if wanted == NOT_THERE else f"has CRC-32 {wanted:08x}"
            raise ValueError(
                f"shard {samples.shards[i].table.name}: {what} of sample {samples.keys[i]} {has} in the index, but "
                f"{crc:08x} was read; the tar was changed or damaged, make its features again "
                "(training.check_payloads looks for this)"
            )

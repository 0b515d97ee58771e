"""Fills a micro-batch: the payloads of its samples in every family, and its random numbers.

The random numbers of a sample depend on (seed, stream, step, position in the global batch) alone: neither world size,
nor gradient accumulation, nor a resume changes them.
"""

# B samples of a micro-batch, C latent channels, h x w latent size

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from training.data.batch import Buffers, PackedBatch, PackedRows
from training.data.datasets import Dataset
from training.data.index import OpenShard, bucket_size
from training.data.plan import PlannedBatch
from training.data.reading import LocatedSamples, RaggedReading, StackedReading


def locate_samples(
    planned: PlannedBatch, positions: range, shards: Mapping[int, OpenShard], *, bucket: str, draws: np.ndarray
) -> LocatedSamples:
    """Look up the samples at `positions` of a global batch; uniform numbers `draws` [B] choose their captions."""
    part = slice(positions.start, positions.stop)
    numbers, ordinals = planned.shards[part], planned.ordinals[part]
    order = np.argsort(numbers, kind="stable")
    keys, labels = np.empty(len(order), dtype=object), np.empty(len(order), dtype=np.int64)
    original_sizes = np.empty((len(order), 2), dtype=np.int64)
    families = shards[int(numbers[0])].table.families
    located = {name: np.empty((len(order), len(rows.columns)), dtype=np.int64) for name, rows in families.items()}
    cuts = np.flatnonzero(np.diff(numbers[order])) + 1
    for mine in np.split(order, cuts):
        table = shards[int(numbers[mine[0]])].table
        samples = table.find(bucket, ordinals[mine])
        keys[mine], labels[mine] = table.keys[samples], table.labels[samples]
        original_sizes[mine] = table.original_sizes[samples]
        for name, rows in table.families.items():
            located[name][mine] = rows.numbers[rows.choose(samples, draws[mine])]
    return LocatedSamples(
        keys=keys.tolist(),
        shards=[shards[number] for number in numbers.tolist()],
        rows=located,
        labels=labels,
        original_sizes=original_sizes,
    )


def bucket_ratio(name: str) -> float:
    """Return height / width of a bucket as PixArt's tables have it for a key, which its training fed: two digits."""
    height, width = bucket_size(name)
    return round(height / width, 2)


class SampleRandom:
    """A counter-based generator that can be put at any (step, position)."""

    def __init__(self, seed: int, stream: int) -> None:
        self._bits = np.random.Philox(key=[seed, stream])
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
        dataset: a dataset of the stage; what its families' members hold, and the null captions, are the same in all.
        buckets: names by the plan's bucket numbers.
        seed, stream: of the random numbers.
        caption_dropout: probability that a sample's condition becomes the null one.
        is_stratified: whether the draws for timesteps are spread evenly over each global batch.
        checks_payloads: whether the CRC-32 of what is read is compared with the index.

    Raises:
        MissingFileError: a directory of captions has no null caption.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        buckets: list[str],
        seed: int,
        stream: int,
        caption_dropout: float,
        is_stratified: bool = False,
        checks_payloads: bool = False,
    ) -> None:
        self._buckets = buckets
        self._caption_dropout = caption_dropout
        self._is_stratified = is_stratified
        self._random = SampleRandom(seed, stream)
        self._leading = dataset.leading.family
        self._has_latents = self._leading.tensors[0].name == "mean"
        self._has_labels = dataset.has_labels
        self._stacked: dict[str, StackedReading] = {}
        self._ragged: dict[str, RaggedReading] = {}
        for directory in dataset.directories:
            name = directory.family.name
            if directory.family.is_ragged:
                self._ragged[name] = RaggedReading(directory, checks_payloads=checks_payloads)
            else:
                self._stacked[name] = StackedReading(directory.family, checks_payloads=checks_payloads)

    def assemble(
        self, buffers: Buffers, planned: PlannedBatch, positions: range, shards: Mapping[int, OpenShard]
    ) -> PackedBatch:
        """Return the batch of the samples at `positions` of the planned global batch, all of whose `shards` are open.

        Raises:
            UserError: a tar is shorter than its index says, bytes have changed, or shapes differ in a bucket; names
                shard and key.
        """
        bucket = self._buckets[planned.bucket]
        noises = {}
        if self._has_latents:
            noises = self._take_noises(buffers, planned, positions, shards, bucket=bucket)
        draws = self._draw(planned.step, positions, list(noises.values()))  # [B, 3]
        is_dropped = draws[:, 0] < self._caption_dropout
        samples = locate_samples(planned, positions, shards, bucket=bucket, draws=draws[:, 1])
        size = buffers.take("size", (len(positions), 3), dtype=torch.float32)
        size[:, :2] = torch.from_numpy(samples.original_sizes)
        size[:, 2] = bucket_ratio(bucket)
        stacked, ragged = self.read(buffers, samples, is_dropped=is_dropped)
        # Latents have fields of their own; of pixels they are empty.
        leading = (
            stacked.pop(self._leading.name) if self._has_latents else {"mean": torch.empty(len(positions), 0, 0, 0)}
        )
        captions = list(ragged.values())
        return PackedBatch(
            step=planned.step,
            bucket=bucket,
            keys=samples.keys,
            shards=[shard.table.name for shard in samples.shards],
            mean=leading["mean"],
            std=leading.get("std"),
            posterior_noise=noises.get("posterior_noise"),
            noise=noises.get("noise", torch.empty(len(positions), 0, 0, 0)),
            timestep_draws=torch.from_numpy(self._timestep_draws(planned, positions, draws[:, 2])),
            is_dropped=torch.from_numpy(is_dropped),
            is_prior=torch.tensor([shard.role == "prior" for shard in samples.shards]),
            size=size,
            text=captions[0] if captions else None,
            labels=torch.from_numpy(samples.labels) if self._has_labels else None,
            tensors={f"{name}.{key}": value for name, tensors in stacked.items() for key, value in tensors.items()},
            texts=dict(list(ragged.items())[1:]),
        )

    def _take_noises(
        self,
        buffers: Buffers,
        planned: PlannedBatch,
        positions: range,
        shards: Mapping[int, OpenShard],
        *,
        bucket: str,
    ) -> dict[str, Tensor]:
        """Return memory for the noises of a batch [B, C, h, w]; that of the posterior only where there is one."""
        first = positions.start
        table = shards[int(planned.shards[first])].table
        sample = table.find(bucket, planned.ordinals[first : first + 1])[0]
        row = table.families[self._leading.name].numbers[sample]
        shape = (len(positions), *self._stacked[self._leading.name].shape(row))
        has_std = any(tensor.name == "std" for tensor in self._leading.tensors)
        names = ("posterior_noise", "noise") if has_std else ("noise",)
        return {name: buffers.take(name, shape, dtype=torch.float32) for name in names}

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

    def _timestep_draws(self, planned: PlannedBatch, positions: range, own: np.ndarray) -> np.ndarray:
        """Return uniform numbers [B] for timesteps: the samples' own, or these within a stratum of the global batch.

        They are (i + u_i) / N for i = 0 ... N-1 in shuffled order and the samples' own u_i: each is uniform by itself,
        and N of them cover the times evenly. VDM's sampler (Kingma et al. 2021, appendix I.1) has one u for all; but
        objectives take further numbers from the digits of a draw, which would then be one number, too.
        """
        if not self._is_stratified:
            return own.copy()
        num_samples = len(planned.shards)
        generator = self._random.at(planned.step, num_samples)  # where no sample of the batch has its numbers
        strata = generator.permutation(num_samples)[positions.start : positions.stop]
        return np.minimum((strata + own) / num_samples, np.nextafter(1.0, 0.0))

    def read(
        self, buffers: Buffers, samples: LocatedSamples, *, is_dropped: np.ndarray
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, PackedRows]]:
        """Copy all payloads of `samples` into `buffers`; returns stacked tensors, and packed rows, by family."""
        stacked = {name: reading.read(buffers, samples) for name, reading in self._stacked.items()}
        ragged = {name: reading.read(buffers, samples, is_dropped=is_dropped) for name, reading in self._ragged.items()}
        return stacked, ragged

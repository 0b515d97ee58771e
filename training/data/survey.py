"""What all shards of a stage hold together: counted once, kept beside its checkpoints, read by every rank."""

# S shards, K buckets

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import MissingFileError, UserError
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_json, remove_temporary_files
from pipelines.store.state_files import read_state, state_of
from training.data.index import FeatureIndex, ShardTable, bucket_size

NUM_COUNTING_THREADS = 8

log = get_logger("training")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What all shards hold together.

    Attributes:
        buckets: names, in the order of the columns of `counts`.
        counts: of each dataset, number of samples by shard and bucket, [S, K]; shards as the dataset lists them.
        channels: of the latents.
        downsample: pixels of one latent, each way.
        max_label: largest class label, -1 without labels.
        num_without_size: samples of which the index does not say how large their image was.
    """

    buckets: list[str]
    counts: list[list[list[int]]]
    channels: int
    downsample: int
    max_label: int
    num_without_size: int

    @property
    def num_samples(self) -> list[int]:
        """Samples of an epoch of each dataset."""
        return [sum(map(sum, counts)) for counts in self.counts]


class ShardSurvey(NamedTuple):
    """What one shard holds."""

    counts: dict[str, int]
    channels: set[int]
    downsample: set[int]
    max_label: int
    num_without_size: int


def survey_shards(index: FeatureIndex, shards: Sequence[int]) -> list[ShardSurvey]:
    """Read the indices of `shards`, and compare the sizes of local tars with them.

    Raises:
        MissingFileError, UserError: an index or tar is missing, cut short or cannot be used; names the shard.
    """

    def survey(shard: int) -> ShardSurvey:
        table = index.load_table(shard)
        _require_whole_tars(index, shard, table)
        return _describe(table, leading=index.dataset(shard).leading.family.name)

    with ThreadPoolExecutor(NUM_COUNTING_THREADS) as pool:
        return list(pool.map(survey, shards))


def make_survey(index: FeatureIndex, shards: Sequence[ShardSurvey]) -> Survey:
    """Sum up the surveys of all shards.

    Raises:
        UserError: a dataset has no sample with all its features, or the latents are of several VAEs.
    """
    where = ", ".join(str(dataset.leading) for dataset in index.datasets)
    buckets = sorted({name for shard in shards for name in shard.counts}, key=bucket_size)
    channels = {size for shard in shards for size in shard.channels}
    downsample = {size for shard in shards for size in shard.downsample}
    if len(channels) > 1 or len(downsample) > 1:
        raise UserError(f"{where}: latents of several VAEs: channels {channels}, pixels each {downsample}")
    counts: list[list[list[int]]] = []
    shards_left = shards
    for dataset in index.datasets:
        own, shards_left = shards_left[: len(dataset.shards)], shards_left[len(dataset.shards) :]
        counts.append([[shard.counts.get(name, 0) for name in buckets] for shard in own])
        if not sum(map(sum, counts[-1])):
            raise UserError(f"{dataset.leading}: no sample of {len(dataset.shards)} shards has all its features")
    return Survey(
        buckets=buckets,
        counts=counts,
        channels=channels.pop(),
        downsample=downsample.pop(),
        max_label=max(shard.max_label for shard in shards),
        num_without_size=sum(shard.num_without_size for shard in shards),
    )


def save_survey(survey: Survey, path: Path, *, identity: str) -> None:
    """Keep a survey, so that ranks and later runs need not read every shard's index again."""
    remove_temporary_files(path.parent, path.name)
    atomic_write_json(path, {"identity": identity, **asdict(survey)})


def load_survey(path: Path, *, identity: str) -> Survey | None:
    """Return the survey kept at `path` if it is of the data that `identity` stands for; a damaged one is none."""
    if not path.is_file():
        return None
    mend = "the shards are counted again"
    try:
        content = read_state(path, mend=mend, keys=("identity",))
        is_same = content.pop("identity") == identity
        return state_of(Survey, content, where=str(path), mend=mend) if is_same else None
    except UserError as error:
        log.warning(str(error))
        return None


def _describe(table: ShardTable, *, leading: str) -> ShardSurvey:
    channels, latent_heights = (table.families[leading].column(name) for name in ("channels", "height"))
    # A shard's buckets are those it has samples of, so each has a first row.
    first_heights = latent_heights[table.bucket_starts[:-1]].tolist()
    heights = [bucket_size(name)[0] for name in table.bucket_names]
    return ShardSurvey(
        counts=table.bucket_counts(),
        channels=set(np.unique(channels).tolist()),
        downsample={pixels // size for pixels, size in zip(heights, first_heights, strict=True)},
        max_label=int(table.labels.max(initial=-1)),
        num_without_size=int((table.original_sizes < 1).any(axis=1).sum()),
    )


def _require_whole_tars(index: FeatureIndex, shard: int, table: ShardTable) -> None:
    """Refuse a local tar that is missing or ends before its last payload; remote ones are checked when they come."""
    dataset = index.dataset(shard)
    for directory in dataset.directories:
        if directory.cache is not None:
            continue
        rows, num_tensors = table.families[directory.family.name], len(directory.family.tensors)
        path = Path(directory.url(table.name, ".tar"))
        last = int(rows.numbers[:, :num_tensors].max(initial=0))  # offsets are its first columns
        if not path.is_file():
            raise MissingFileError(f"shard {table.name}: {path} is missing; make its features again")
        if path.stat().st_size <= last:
            raise UserError(
                f"shard {table.name}: {path} has {path.stat().st_size} bytes, but by its index a payload starts "
                f"at byte {last}; the tar was cut short, make its features again"
            )

"""What all shards of a stage hold together: counted once, kept beside its checkpoints, read by every rank."""

# S shards, K buckets

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import MissingFileError, UserError
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_json, remove_temporary_files
from pipelines.store.manifest import Fingerprint
from pipelines.store.state_files import read_state, state_of
from training.data.choices import DatasetChoice, Selection
from training.data.datasets import Dataset
from training.data.epochs import epoch_length
from training.data.index import FeatureIndex, ShardTable, bucket_size

NUM_COUNTING_THREADS = 8

log = get_logger("training")


@dataclass(frozen=True, kw_only=True)
class ChoiceSurvey:
    """What a dataset's choice makes of all its shards.

    Attributes:
        num_samples: of the shards.
        num_chosen: of them.
        num_never_drawn: chosen ones whose weight is zero.
        num_without_caption_weight: samples to train on, no caption of which has a weight above zero.
        weights: sum of the samples' weights by shard and bucket, [S, K]; None where all are drawn alike.
        square_sum: of the squares of all weights.
        digest: tells all that training reads of the chosen samples from anything else, wherever in the tars it lies.
    """

    num_samples: int
    num_chosen: int
    num_never_drawn: int
    num_without_caption_weight: int
    weights: list[list[float]] | None
    square_sum: float
    digest: str

    @property
    def effective_number(self) -> float:
        """How many samples of one weight would be drawn as unevenly: 1 / sum of the squared shares."""
        assert self.weights is not None
        return math.fsum(map(math.fsum, self.weights)) ** 2 / self.square_sum


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
        choices: of each dataset, what its choice makes of its shards, None without one; empty where no dataset has one.
    """

    buckets: list[str]
    counts: list[list[list[int]]]
    channels: int
    downsample: int
    max_label: int
    num_without_size: int
    choices: list[ChoiceSurvey | None] = field(default_factory=list)

    @property
    def num_samples(self) -> list[int]:
        """Samples of each dataset."""
        return [sum(map(sum, counts)) for counts in self.counts]

    @property
    def sample_weights(self) -> list[list[list[float]] | None]:
        """Of each dataset whose samples have weights, their sums by shard and bucket, [S, K]; None of the others."""
        choices = self.choices or [None] * len(self.counts)
        return [None if choice is None else choice.weights for choice in choices]

    @property
    def epoch_lengths(self) -> list[int]:
        """Samples that an epoch of each dataset draws."""
        pairs = zip(self.counts, self.sample_weights, self.num_samples, strict=True)
        return [number if weights is None else epoch_length(counts, weights) for counts, weights, number in pairs]


class ShardSurvey(NamedTuple):
    """What one shard holds."""

    counts: dict[str, int]
    channels: set[int]
    downsample: set[int]
    max_label: int
    num_without_size: int
    selection: Selection | None = None
    weights: dict[str, float] | None = None
    square_sum: float = 0.0
    digest: str | None = None


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
        UserError: a dataset has no sample with all its features, or chosen samples without features, or the latents
            are of several VAEs.
    """
    where = ", ".join(str(dataset.leading) for dataset in index.datasets)
    buckets = sorted({name for shard in shards for name in shard.counts}, key=bucket_size)
    channels = {size for shard in shards for size in shard.channels}
    downsample = {size for shard in shards for size in shard.downsample}
    if len(channels) > 1 or len(downsample) > 1:
        raise UserError(f"{where}: latents of several VAEs: channels {channels}, pixels each {downsample}")
    counts: list[list[list[int]]] = []
    choices: list[ChoiceSurvey | None] = []
    shards_left = shards
    for dataset in index.datasets:
        own, shards_left = shards_left[: len(dataset.shards)], shards_left[len(dataset.shards) :]
        counts.append([[shard.counts.get(name, 0) for name in buckets] for shard in own])
        choices.append(None if dataset.choice is None else _sum_up(dataset.choice, own, buckets=buckets))
        if not sum(map(sum, counts[-1])):
            raise UserError(_without_samples(dataset, choices[-1]))
    return Survey(
        buckets=buckets,
        counts=counts,
        channels=channels.pop(),
        downsample=downsample.pop(),
        max_label=max(shard.max_label for shard in shards),
        num_without_size=sum(shard.num_without_size for shard in shards),
        choices=choices if any(choices) else [],
    )


def chosen_digests(survey: Survey) -> list[str | None]:
    """Return what tells the chosen samples of each dataset from any others; None of a dataset that takes all."""
    return [None if choice is None else choice.digest for choice in survey.choices]


def _sum_up(choice: DatasetChoice, shards: Sequence[ShardSurvey], *, buckets: Sequence[str]) -> ChoiceSurvey:
    """Return what a choice makes of the shards of its dataset; refuses one whose samples were not all encoded."""
    selections = [shard.selection for shard in shards if shard.selection is not None]
    _require_features(choice, selections)
    weights = [
        [weights.get(name, 0.0) for name in buckets] for shard in shards if (weights := shard.weights) is not None
    ]
    return ChoiceSurvey(
        num_samples=sum(each.num_samples for each in selections),
        num_chosen=sum(each.num_chosen for each in selections),
        num_never_drawn=sum(each.num_never_drawn for each in selections),
        num_without_caption_weight=sum(each.num_without_caption_weight for each in selections),
        weights=weights if choice.has_weights else None,
        square_sum=math.fsum(shard.square_sum for shard in shards),
        digest=Fingerprint.of({"shards": [shard.digest for shard in shards]}).digest,
    )


def _require_features(choice: DatasetChoice, selections: Sequence[Selection]) -> None:
    """Refuse chosen samples that were not chosen when their features were made."""
    for directory in dict.fromkeys(name for each in selections for name in each.without_features):
        found = [each.without_features[directory] for each in selections if directory in each.without_features]
        num_missing, num_chosen = sum(number for number, _ in found), sum(each.num_chosen for each in selections)
        raise UserError(
            f"{directory} has no features of {num_missing:,} of the {num_chosen:,} samples that {choice.directory} "
            f"chooses, first {found[0][1]}: `{choice.command}` encodes what is missing"
        )


def _without_samples(dataset: Dataset, choice: ChoiceSurvey | None) -> str:
    """Return what is said of a dataset that has nothing to train on."""
    if choice is None:
        return f"{dataset.leading}: no sample of {len(dataset.shards)} shards has all its features"
    assert dataset.choice is not None
    return (
        f"{dataset.choice.directory}: of {choice.num_samples:,} samples in {len(dataset.shards)} shards "
        f"{choice.num_chosen:,} are chosen, {choice.num_never_drawn:,} of them with weight 0, and no other has all "
        "its features"
    )


def save_survey(survey: Survey, path: Path, *, identity: str) -> None:
    """Keep a survey, so that ranks and later runs need not read every shard's index again."""
    remove_temporary_files(path.parent, path.name)
    content = asdict(survey)
    if not survey.choices:  # as surveys were before there were any
        del content["choices"]
    atomic_write_json(path, {"identity": identity, **content})


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
        selection=table.selection,
        weights=None if table.weights is None else table.bucket_weights(),
        square_sum=0.0 if table.weights is None else math.fsum((table.weights**2).tolist()),
        digest=None if table.selection is None else _digest(table),
    )


def _digest(table: ShardTable) -> str:
    """Return a hash over all that training reads of a shard's samples, but for where in the tars it lies."""
    digest = hashlib.sha256("\n".join([*table.bucket_names, *table.keys.tolist()]).encode())
    weights = np.zeros(0) if table.weights is None else table.weights
    arrays = [table.bucket_starts, table.labels, table.original_sizes, weights]
    for _, rows in sorted(table.families.items()):
        # Sizes, and checksums of the payloads.
        arrays += [rows.column(name) for name in rows.columns if not name.endswith("offset")]
        arrays += [rows.starts, rows.shares]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


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

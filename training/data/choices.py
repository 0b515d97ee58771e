"""Which samples of a dataset are trained on and how often: the choice `RUN/choices/<features table>/` of its run."""

# n samples that are drawn, m rows of a shard of text features

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command
from pipelines.columns.choice_settings import CHOICES, ChoiceSettings
from pipelines.columns.choices import Choice
from pipelines.columns.sample_columns import SampleColumns
from pipelines.columns.written_choices import finished_choice
from pipelines.engine.rejects import NOT_CHOSEN
from pipelines.store.files import is_remote
from pipelines.store.manifest import Fingerprint
from pipelines.store.tables import MEND_SHARD, read_table
from training.data.cache import ShardCache
from training.data.directories import FeatureDirectory, open_directory
from training.data.feature_tables import FeatureTable

NOT_THERE = -1


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a choice made of a shard.

    Attributes:
        num_samples: of the shard.
        num_chosen: of them.
        num_never_drawn: chosen ones whose weight is zero.
        num_without_caption_weight: samples to train on, no caption of which has a weight above zero.
        without_features: chosen samples that were not chosen when a directory was made: how many, and the first.
    """

    num_samples: int
    num_chosen: int
    num_never_drawn: int
    num_without_caption_weight: int
    without_features: dict[str, tuple[int, str]]


@dataclass(frozen=True, kw_only=True)
class ChosenSamples:
    """The samples of a shard that are drawn.

    Attributes:
        keys: in raw order, [n].
        weights: of the samples, float64 [n]; None where all are drawn alike.
        caption_weights: of a caption whose weight is an expression, by its `caption_index`, float64 [n]; what is not
            known is 0.
        num_samples: of the shard, chosen or not.
        num_never_drawn: chosen ones whose weight is zero, which `keys` lacks.
    """

    keys: pa.Array
    weights: np.ndarray | None
    caption_weights: Mapping[int, np.ndarray]
    num_samples: int
    num_never_drawn: int

    def selection(self, missing: Mapping[str, list[str]], *, num_without_caption_weight: int) -> Selection:
        """Return what the choice made of the shard; `missing` are keys by the directory that lacks their features."""
        return Selection(
            num_samples=self.num_samples,
            num_chosen=len(self.keys) + self.num_never_drawn,
            num_never_drawn=self.num_never_drawn,
            num_without_caption_weight=num_without_caption_weight,
            without_features={directory: (len(keys), keys[0]) for directory, keys in missing.items() if keys},
        )

    def rows_of(self, keys: Any) -> np.ndarray:
        """Return which of the samples each of some keys is, -1 for none."""
        found = pc.call_function("index_in", [keys], pc.SetLookupOptions(value_set=self.keys))
        return found.fill_null(NOT_THERE).to_numpy().astype(np.int64)

    def weights_of(self, keys: np.ndarray) -> np.ndarray | None:
        """Return the weights of some of the samples, in the order of their keys."""
        return None if self.weights is None else self.weights[self.rows_of(pa.array(keys, pa.string()))]

    def without_features(self, index: pa.Table) -> list[str]:
        """Return the keys that an index has no row of, or rows only of a choice that they were not in."""
        encoded = index.filter(pc.field("reject").is_null() | (pc.field("reject") != NOT_CHOSEN))
        has_row = np.zeros(len(self.keys), dtype=bool)
        rows = self.rows_of(encoded["key"])
        has_row[rows[rows >= 0]] = True
        return self.keys.filter(pa.array(~has_row)).to_pylist()

    def weigh_captions(self, captions: pa.Table) -> tuple[pa.Table, int]:
        """Put the choice's weights into an index of captions of chosen samples, [m].

        Returns the table, and of how many samples no caption has a weight above zero: theirs are drawn alike.
        """
        owners, numbers = self.rows_of(captions["key"]), captions["caption_index"].to_numpy()
        weights = captions["weight"].to_numpy().astype(np.float64)
        for number, own in self.caption_weights.items():
            is_its = numbers == number
            weights[is_its] = own[owners[is_its]]
        totals = np.bincount(owners, weights, minlength=len(self.keys))
        has_none = totals[owners] <= 0
        weights[has_none] = 1.0
        place = captions.column_names.index("weight")
        return captions.set_column(place, "weight", pa.array(weights)), len(np.unique(owners[has_none]))


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """A dataset's folder of choices: one row per sample of each raw shard.

    Attributes:
        run: a folder or URL.
        settings: the expressions that it was made by.
        directory: where it lies.
        has_weights: whether samples are drawn by weight.
        captions: columns of captions whose weight is an expression, by their `caption_index`.
        command: what makes choice and features anew.
    """

    run: str
    settings: ChoiceSettings
    directory: FeatureDirectory
    has_weights: bool
    captions: Mapping[int, str]
    command: str

    def read(self, shard: str, *, is_stopping: threading.Event | None = None) -> ChosenSamples:
        """Return the samples of a shard that are drawn.

        Raises:
            UserError: a key is there twice, or a weight is negative or not finite; names shard and key.
            MissingFileError, StorageError: the file cannot be read.
        """
        names = [f"weight.{column}" for column in self.captions.values()]
        columns = ["key", "chosen", *(["weight"] if self.has_weights else []), *names]
        with self.directory.open(shard, ".parquet", is_stopping=is_stopping) as file:
            table = read_table(file.path, columns, mend=MEND_SHARD).combine_chunks()
        if pc.call_function("count_distinct", [table["key"]]).as_py() < len(table):
            raise UserError(f"{self.directory}: shard {shard} has a key twice; `{self.command}` writes it anew")
        chosen = table.filter(pc.field("chosen"))
        num_chosen, weights = len(chosen), None
        if self.has_weights:
            weights = self._weights(chosen, "weight", shard=shard)
            chosen, weights = chosen.filter(pa.array(weights > 0)), weights[weights > 0]
        captions = {
            number: self._weights(chosen, name, shard=shard) for number, name in zip(self.captions, names, strict=True)
        }
        keys = chosen["key"].combine_chunks()
        return ChosenSamples(
            keys=keys,
            weights=weights,
            caption_weights=captions,
            num_samples=len(table),
            num_never_drawn=num_chosen - len(keys),
        )

    def _weights(self, chosen: pa.Table, name: str, *, shard: str) -> np.ndarray:
        """Return a column of weights; one that is not known counts as 0."""
        weights = chosen[name].fill_null(0.0).to_numpy().astype(np.float64)
        wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
        if len(wrong):
            first = int(wrong[0])
            raise UserError(
                f"{self.directory}: shard {shard}: {name} of {len(wrong):,} samples is no finite number of 0 or more, "
                f"first that of {chosen['key'][first]}: {weights[first]:g}; mend it and run `{self.command}`"
            )
        return weights

    def is_outdated(self, shards: list[str]) -> bool:
        """Whether the run's columns are others than those that shards were chosen by; of columns elsewhere it is not
        known.
        """
        if is_remote(self.run):
            return False
        run = Path(self.run)
        try:
            here = {folder.name for folder in SampleColumns(run).folders}
            is_here = bool(self.directory.manifest.upstream) and here.issuperset(self.directory.manifest.upstream)
            return is_here and finished_choice(Choice(run, self.settings), shards) is None
        except (KeyError, UserError):  # a column or one of its shards is gone, or damaged
            return True

    def fingerprint_fields(self, shards: list[str]) -> dict[str, Any]:
        """Return what identifies the choice: its expressions, and a hash over the files of `shards`."""
        manifest = self.directory.manifest
        fields = {f"choice.{name}": value for name, value in manifest.fingerprint.fields.items()}
        files = {name: manifest.shards[name].files for name in shards}
        return fields | {"choice.files": Fingerprint.of(files).digest}


def open_choice(
    run: str, table: FeatureTable, *, table_name: str, reads_text: bool, cache: ShardCache
) -> DatasetChoice | None:
    """Open the choice that a table of features makes in a run, a folder or URL; None of a table that makes none.

    Raises:
        MissingFileError: there is no choice yet.
        UserError: an expression is none, or the choice was made by others than the recipe's; names both, and the
            command that makes it anew.
    """
    settings = ChoiceSettings.of(table_name, table.model_dump())
    if settings is None:
        return None
    location = f"{run}/{CHOICES}/{table_name}"
    command = typed_command("features", {"stage": table_name, "run": run})
    wanted = settings.fingerprint.fields
    try:
        directory = open_directory(location, cache if is_remote(location) else None)
    except MissingFileError:
        by = ", ".join(f"{name} = {value!r}" for name, value in wanted.items() if value and name != "version")
        raise MissingFileError(
            f"{location} has no finished choice, and features.{table_name} chooses by {by}; run `{command}` first"
        ) from None
    found = directory.manifest.fingerprint.fields
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{location} was made with {name} {found.get(name)!r}, but it is {wanted.get(name)!r} in "
                f"features.{table_name} now: `{command}` chooses anew, and encodes only what it lacks"
            )
    numbers = {caption.column: number for number, caption in enumerate(table.captions)}
    return DatasetChoice(
        run=run,
        settings=settings,
        directory=directory,
        has_weights=settings.weight is not None,
        captions={numbers[column]: column for column in settings.caption_weights} if reads_text else {},
        command=command,
    )


def require_all_encoded(directory: FeatureDirectory, shards: list[str], *, table_name: str, command: str) -> None:
    """Refuse features of which another table's choice left samples out, for a table that chooses none.

    Raises:
        UserError: names the directory, how many samples there are, and what to do about it.
    """
    reports = [directory.manifest.shards[name] for name in shards]
    num_left_out = sum(report.rejected.get(NOT_CHOSEN, 0) for report in reports)
    if num_left_out:
        num_samples = sum(report.num_read for report in reports)
        raise UserError(
            f"{directory} has no features of {num_left_out:,} of {num_samples:,} samples, which the `where` of another "
            f"table left out, and features.{table_name} has none: `{command}` encodes them; or have the same `where`"
        )

"""What a choice of samples means for a job: how many are left to encode, and finished shards that lack some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from errors import UserError
from features.completing import SUFFIXES
from pipelines.columns.choices import Choice
from pipelines.engine.pieces import Source
from pipelines.engine.rejects import NOT_CHOSEN
from pipelines.engine.set_aside import EARLIER_FOLDER, clear_set_aside, set_shard_aside
from pipelines.store.files import exclusive
from pipelines.store.manifest import Fingerprint, ShardDirectory
from pipelines.store.tables import MEND_SHARD, read_table


@dataclass(frozen=True, kw_only=True)
class WantedSamples:
    """The samples that a command wants in a directory of features; `choice` None wants all of them."""

    output: ShardDirectory
    sources: Sequence[Source]
    fingerprint: Fingerprint
    choice: Choice | None

    @cached_property
    def incomplete(self) -> dict[str, int]:
        """How many samples finished shards lack, of those that lack some: a choice had left them out."""
        return self.find_incomplete()

    def find_incomplete(self) -> dict[str, int]:
        """Return `incomplete` as it is now."""
        found = {}
        for source in self.sources:
            report = self.output.report(source.name, self.fingerprint)
            if report is None or not report.rejected.get(NOT_CHOSEN):
                continue
            is_done = self.output.is_done(source.name, source.identity, self.fingerprint)
            if is_done and (num_missing := self._count_missing(source, self.output.path)):
                found[source.name] = num_missing
        return found

    def count_left(self) -> int:
        """Return how many samples are to be looked at: of shards that are not done, and of those that lack some."""
        num_left = sum(self.incomplete.values())
        for source in self.sources:
            if source.name in self.incomplete or self.output.is_done(source.name, source.identity, self.fingerprint):
                continue
            earlier = self.output.path / EARLIER_FOLDER
            if (earlier / f"{source.name}.json").is_file() and (earlier / f"{source.name}.parquet").is_file():
                num_left += self._count_missing(source, earlier)
            else:
                num_left += int(self.chosen(source).sum())
        return num_left

    def count(self) -> int:
        """Return how many samples are wanted."""
        return sum(int(self.chosen(source).sum()) for source in self.sources)

    def chosen(self, source: Source) -> np.ndarray:
        """Return which samples of a shard are wanted, bool [n].

        Raises:
            UserError: the columns have another number of samples than the shard.
        """
        if self.choice is None:
            return np.ones(source.num_samples, bool)
        chosen = self.choice.chosen(source.name)
        if len(chosen) != source.num_samples:
            raise UserError(
                f"{self.choice.settings.directory(self.choice.run)}: {source.name} has {source.num_samples:,} samples, "
                f"but its columns have {len(chosen):,}: they were made before {source.path} changed; "
                f"{self.choice.command_of(source.name)} makes them anew"
            )
        return chosen

    def set_aside(self) -> int:
        """Set finished shards that lack samples aside, to be completed; returns how many there are."""
        if not self.find_incomplete():
            return 0
        with exclusive(self.output.path):
            # Asked under the lock: another command may have completed them.
            names = self.find_incomplete()
            for source in self.sources:
                if source.name in names:
                    set_shard_aside(self.output, source, self.fingerprint, suffixes=SUFFIXES)
        return len(names)

    def clear(self) -> None:
        """Forget what was set aside of shards that are whole again, or that nothing can be taken from."""
        if (self.output.path / EARLIER_FOLDER).is_dir():
            with exclusive(self.output.path):
                clear_set_aside(
                    self.output,
                    self.sources,
                    self.fingerprint,
                    suffixes=SUFFIXES,
                    made_under=lambda name: self.fingerprint,
                )

    def _count_missing(self, source: Source, folder: Path) -> int:
        """Return how many wanted samples a choice has left out of a shard's index."""
        table = read_table(folder / f"{source.name}.parquet", ["key", "reject"], mend=MEND_SHARD)
        rejects = np.array(table["reject"].to_pylist(), object).reshape(source.num_samples, -1)
        return int((self.chosen(source) & (rejects == NOT_CHOSEN).all(axis=1)).sum())

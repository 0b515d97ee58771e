"""The columns of a user's table, joined by key: `[columns.tables.<name>] files = "scores.parquet#key,punsafe"`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.joined_cells import ARROW_TYPES
from curation.joined_index import JoinedRows, columns_of, open_index, parse_address
from curation.scores.protocol import Column, RunScore
from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.tables.places import sample_places

log = get_logger("columns")


class JoinedTable(RunScore):
    """The rows of a table, each beside the sample that its key names, by key, path or URL as given captions are.

    A sample without a row has nulls. Texts of CSV and TSV are read as numbers or truths where all of a column are.
    """

    version: ClassVar[int] = 2

    def __init__(self, name: str, files: str, run: Path) -> None:
        """Read the table, unless it is known; raises as `open_index`."""
        self.name = name
        self._key = f"columns.tables.{name}.files"
        self._address = parse_address(self._key, files.replace("{run}", str(run)))
        self._path, self._facts = open_index(self._address, run)
        self.columns = tuple(
            Column(name=each.name, type=ARROW_TYPES[each.kind], unit="", meaning=f"Column {each.source} of {files}")
            for each in columns_of(self._facts)
        )

    def source(self) -> str:
        """Return the hash of the table's rows."""
        return self._facts.identity

    def measure_run(
        self, shards: Sequence[str], read: Callable[[str], pa.Table], scratch: Path
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the values of each shard's samples.

        Raises:
            UserError: no sample has a row, or a row is of several samples; names them.
        """
        del scratch
        # Which sample each row was given to, as its number over all shards.
        takers = np.full(self._facts.num_rows, -1, dtype=np.int64)
        num_samples, index = 0, JoinedRows(self._path)
        try:
            for shard in shards:
                keys = read(shard)["key"].to_pylist()
                rows = [self._row(index, shard, key) for key in keys]
                self._take(index, takers, rows, shard=shard, keys=keys, first=num_samples)
                num_samples += len(keys)
                if shard == shards[-1]:  # before it is written, and with it all
                    self._say_matches(int((takers >= 0).sum()), num_samples, example=keys[0] if keys else "")
                values = [None if row is None else index.values(row) for row in rows]
                yield {
                    column.name: [None if row is None else row[place] for row in values]
                    for place, column in enumerate(self.columns)
                }
        finally:
            index.close()

    def _say_matches(self, num_taken: int, num_samples: int, *, example: str) -> None:
        """Say how many samples and rows have found each other; raises `UserError` if none have."""
        facts = self._facts
        if not num_taken and num_samples:
            raise UserError(
                f"{self._key}: none of its {facts.num_rows:,} rows names one of the {num_samples:,} samples, whose "
                f"keys are like {example!r}"
            )
        num_others = facts.num_rows - num_taken - facts.own["num_without_key"]
        log.info(
            f"{self.name}: {num_taken:,} of {num_samples:,} samples have a row, the others have nulls; "
            f"{num_others:,} rows of the table name no sample"
        )

    def _row(self, index: JoinedRows, shard: str, key: str) -> int | None:
        found = index.find(sample_places(shard, key))
        if len(found) > 1:
            first, second = (self._facts.where(number) for number in found[:2])
            raise UserError(
                f"{self._key}: {shard}/{key} may be {first} or {second}; write its shard in front of the key"
            )
        return found[0] if found else None

    def _take(
        self,
        index: JoinedRows,
        takers: np.ndarray,
        rows: Sequence[int | None],
        *,
        shard: str,
        keys: Sequence[str],
        first: int,
    ) -> None:
        """Note who has taken a row; raises `UserError` where it was another sample."""
        for place, row in enumerate(rows):
            if row is not None and takers[row] >= 0:
                raise UserError(
                    f"{self._key}: {self._facts.where(row)} is of several samples, such as "
                    f"{shard}/{keys[place]} and the one {first + place - int(takers[row]):,} before it; write the "
                    "shard in front of the key, as shard/key"
                )
            if row is not None:
                takers[row] = first + place

"""The worker of scores that are made from columns and texts that are there: no image is read."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from curation.score_files import count_unknown, rejects_of, rows_of, write_rows
from curation.scores.protocol import TableScore
from curation.table_rows import read_inputs
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.reading import Reading
from pipelines.raw.shards import open_shard
from pipelines.store.files import atomic_file
from pipelines.store.tables import MEND_PART, read_table


@dataclass(frozen=True, kw_only=True)
class TableWorkerConfig:
    """What a worker process needs to know.

    Attributes:
        reading: which samples raw shards have.
        raw_identities: of the raw shards, by name.
    """

    score: TableScore
    reading: Reading
    run: Path
    raw_identities: Mapping[str, str]


class TableWorker:
    """Makes `<shard>.parquet` of one score."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, config: TableWorkerConfig) -> None:
        self._config = config

    def __call__(self, piece: Piece) -> PieceReport:
        """Make the columns of a piece."""
        start_seconds = time.monotonic()
        config, source = self._config, piece.source
        identity = config.raw_identities[source.name]
        with open_shard(source.path, config.reading, run=config.run, identity=identity) as raw:
            keys = [sample.key for sample in raw.samples]
        table, reasons = read_inputs(config.run, config.score.reads, source.name, keys)
        parts = []
        for start, stop in piece.slices():
            rows, why = table.slice(start, stop - start), reasons[start:stop]
            kept = rows.filter(pa.array([reason is None for reason in why]))
            measured = config.score.measure(kept) if kept.num_rows else {}
            parts.append(rows_of(config.score, keys[start:stop], why, measured))
        made = pa.concat_tables(parts) if parts else rows_of(config.score, [], [], {})
        with atomic_file(piece.output(".parquet")) as path:
            write_rows([made], path)
        rejected = rejects_of(made)
        return PieceReport(
            num_read=made.num_rows,
            num_kept=made.num_rows - sum(rejected.values()),
            rejected=rejected,
            details=count_unknown(made) | config.score.details(made),
            busy_seconds=time.monotonic() - start_seconds,
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Concatenate the parts of a shard."""
        write_rows([read_table(part[".parquet"], mend=MEND_PART) for part in parts], outputs[".parquet"])

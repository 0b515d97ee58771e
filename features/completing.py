"""Any family's worker, asked for the samples alone that a choice wants; what a shard that is set aside has is reused.

A sample of it keeps its member byte for byte, or its reject: only those that were not chosen are looked at.
"""

# n samples of a piece, r rows of each in an index

import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.columns.written_choices import read_chosen
from pipelines.engine.pieces import Piece, PieceReport, ShardWorker
from pipelines.engine.rejects import NOT_CHOSEN
from pipelines.engine.set_aside import read_note
from pipelines.store.families import FamilySchema
from pipelines.store.feature_store import FeatureTarWriter, join_shards, payload_crc32, read_payload, write_index
from pipelines.store.files import atomic_file
from pipelines.store.tables import MEND_PART, read_table

SUFFIXES = (".tar", ".parquet")
# In a report's details, what is neither summed nor the largest: the newest counts.
NEWEST = ("preview_psnr_db",)


@dataclass(frozen=True, kw_only=True)
class CompletingConfig:
    """What a `CompletingWorker` needs.

    Attributes:
        worker_class: of the family, with its `worker` configuration.
        family: record of what it writes.
        choice: folder of the choice of samples; None wants all.
        earlier: folder of shards that are set aside.
    """

    worker_class: type[ShardWorker]
    worker: Any
    family: FamilySchema
    choice: Path | None
    earlier: Path


class CompletingWorker:
    """Makes what is wanted of a shard's samples and not there yet; others are rejects, `not_chosen`."""

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    join = staticmethod(join_shards)

    def __init__(self, config: CompletingConfig) -> None:
        self._config = config
        self._worker = config.worker_class(config.worker)

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop).

        Raises:
            UserError: the choice, or what is set aside, is of other samples than the shard's, or is damaged.
        """
        keys, wanted = self._wanted(piece)
        note = read_note(self._config.earlier, piece.source.name)
        if note is None:
            report = self._worker(piece if keys is None else replace(piece, wanted=wanted.tolist()))
            self._require_keys(keys, piece, piece)
            return report
        earlier = self._earlier(piece)
        is_settled = np.array([not is_left_out(rows) for rows in earlier.rows], bool)
        # Under a name of its own, which the engine knows for a part that is nobody's.
        own = replace(piece, attempt=secrets.token_hex(4), wanted=(wanted & ~is_settled).tolist())
        report = self._worker(own)
        self._require_keys(keys, own, piece)
        made = _Members.of(own.output(".tar"), read_table(own.output(".parquet"), mend=MEND_PART), self._config.family)
        rejected = _merge([earlier if settled else made for settled in is_settled], piece, family=self._config.family)
        for suffix in SUFFIXES:
            own.output(suffix).unlink()
        return replace(
            report,
            num_kept=report.num_read - rejected.total(),
            rejected=dict(rejected),
            details=_with_details(report.details, note.details if piece.start == 0 else {}),
        )

    def _wanted(self, piece: Piece) -> tuple[list[str] | None, np.ndarray]:
        """Return the keys of the piece's samples as the choice has them, and which it wants [n]."""
        if self._config.choice is None:
            return None, np.ones(piece.stop - piece.start, bool)
        keys, chosen = read_chosen(self._config.choice, piece.source.name)
        if len(keys) != piece.source.num_samples:
            raise UserError(_other_samples(self._config.choice, piece))
        return keys[piece.start : piece.stop], chosen[piece.start : piece.stop]

    def _require_keys(self, keys: list[str] | None, made: Piece, piece: Piece) -> None:
        if keys is None:
            return
        found = read_table(made.output(".parquet"), ["key"], mend=MEND_PART)["key"].to_pylist()
        if found[:: self._config.family.rows_per_sample] != keys:
            assert self._config.choice is not None
            raise UserError(_other_samples(self._config.choice, piece))

    def _earlier(self, piece: Piece) -> "_Members":
        path = self._config.earlier / f"{piece.source.name}.tar"
        mend = "remove it and type the command again: this shard is made anew"
        index = read_table(path.with_suffix(".parquet"), mend=mend)
        per_sample = self._config.family.rows_per_sample
        rows = index.slice(piece.start * per_sample, (piece.stop - piece.start) * per_sample)
        return _Members.of(path, rows, self._config.family)


def is_left_out(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a choice has left a sample out, by its rows in an index."""
    return all(row["reject"] == NOT_CHOSEN for row in rows)


@dataclass(frozen=True)
class _Members:
    """A tar, mapped, and the rows of some of its samples, [n][r]."""

    path: Path
    tar: np.ndarray
    rows: list[list[dict[str, Any]]]

    @classmethod
    def of(cls, path: Path, index: pa.Table, family: FamilySchema) -> "_Members":
        rows, per_sample = index.to_pylist(), family.rows_per_sample
        samples = [rows[start : start + per_sample] for start in range(0, len(rows), per_sample)]
        return cls(path, np.memmap(path, np.uint8, mode="r"), samples)

    def payloads(self, rows: Sequence[Mapping[str, Any]], family: FamilySchema) -> Iterator[list[np.ndarray]]:
        """Yield the tensors of each row."""
        for row in rows:
            arrays = [
                read_payload(self.tar, row[tensor.offset], dtype=tensor.dtype, shape=tensor.shape_in(row))
                for tensor in family.tensors
            ]
            if payload_crc32(*arrays) != row["crc32"]:
                raise UserError(
                    f"{self.path}: bytes of {row['key']!r} have changed (CRC-32); remove it and type the command "
                    "again: this shard is made anew"
                )
            yield arrays


def _merge(samples: Sequence[_Members], piece: Piece, *, family: FamilySchema) -> Counter[str]:
    """Write a piece of which each sample is taken from where `samples` says; returns its rejects by reason."""
    rejected: Counter[str] = Counter()
    merged: list[dict[str, Any]] = []
    with atomic_file(piece.output(".tar")) as tar_path, FeatureTarWriter(tar_path) as tar:
        for index, members in enumerate(samples):
            rows = members.rows[index]
            kept = [row for row in rows if row["reject"] is None]
            if kept:
                family.write(tar, kept, list(members.payloads(kept, family)))
            else:
                rejected[rows[0]["reject"]] += 1
            merged += rows
    with atomic_file(piece.output(".parquet")) as index_path:
        write_index(index_path, merged, family.columns)
    return rejected


def _with_details(details: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return the details of what was made and of what was there together, as a shard's pieces sum theirs."""
    found = dict(details)
    for name, value in earlier.items():
        if name not in found:
            found[name] = value
        elif name not in NEWEST:
            found[name] = max(found[name], value) if name.startswith("max_") else found[name] + value
    return found


def _other_samples(choice: Path, piece: Piece) -> str:
    run = choice.parent.parent
    return (
        f"{choice} is not of the samples that {piece.source.path} has now: its columns were made before the shard "
        f"changed; `{typed_command('verify', {'run': run})}` tells which, and their commands make them anew"
    )

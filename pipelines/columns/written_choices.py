"""`RUN/choices/<table>/<shard>.parquet`: which samples are chosen and how often they are drawn, one row per sample.

Columns: `key`, `chosen`, `weight` (null where the table has none, or of a sample that is not chosen), and
`weight.<column>` of each caption whose weight is an expression. Nothing is done where nothing has changed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.columns.choice_counts import ChoiceCounts, by_source, describe_counts, sum_counts
from pipelines.columns.choices import Choice, ShardChoice, require_some
from pipelines.engine.progress import get_logger
from pipelines.engine.rejects import NOT_CHOSEN
from pipelines.store.files import atomic_file, exclusive, sha256_file, sha256_text
from pipelines.store.manifest import Manifest, ShardDirectory, ShardReport, manifest_path, read_manifest
from pipelines.store.tables import MEND_SHARD, read_table

# Of a shard's report: its counts. Of the manifest: what a temperature's weights are relative to.
COUNTS, SCALE = "counts", "largest_weight"
LEAST_FLOAT32 = float(np.finfo(np.float32).tiny)

log = get_logger("choices")


def write_choice(choice: Choice, shards: Sequence[str]) -> Manifest:
    """Write what is chosen of some shards, and return the manifest, which has the counts.

    Killed at any moment, the next command goes on. Files of the same columns and expressions stay as they are.

    Raises:
        UserError: as `Choice.check` and `Choice.evaluate`, or nothing is chosen; then nothing is written.
    """
    names = sorted(shards)
    choice.check(names)
    output = ShardDirectory(choice.settings.directory(choice.run))
    if (manifest := finished_choice(choice, names)) is not None:
        require_some(_counts(manifest, names).values(), choice)
        log.info(f"nothing to choose anew: {output.path} is of these expressions and columns")
        return manifest
    # The first look, which weights are relative to, and which may find that nothing is chosen.
    counts = {found.shard: found.counts for found in choice.evaluate_each(names)}
    total = require_some(counts.values(), choice)
    scale = _scale(total, choice)
    with exclusive(output.path):
        output.clear_leftovers(is_held=True)
        pending = [name for name in names if not _is_done(choice, output, name, scale)]
        if pending:
            output.clear_manifest()
        for name in output.marked():
            # What other shards are drawn by is relative to another weight.
            if scale is not None and name not in names:
                output.clear_marker(name)
        for found in choice.evaluate_each(pending):
            _write_shard(choice, output, found, scale)
        manifest = _write_manifest(choice, output, names, scale)
    for line in describe_counts(total):
        log.info(f"{choice.settings.table}: {line}")
    return manifest


def finished_choice(choice: Choice, shards: Sequence[str]) -> Manifest | None:
    """Return the manifest of a choice that is written for all of the shards, as columns and expressions are now."""
    output = ShardDirectory(choice.settings.directory(choice.run))
    if not manifest_path(output.path).is_file():
        return None
    manifest = read_manifest(output.path)
    if manifest.fingerprint.digest != choice.settings.fingerprint.digest or SCALE not in manifest.extra:
        return None
    scale = manifest.extra[SCALE]
    is_done = all(name in manifest.shards and _is_done(choice, output, name, scale) for name in shards)
    return manifest if is_done else None


def read_chosen(directory: Path, shard: str) -> tuple[list[str], np.ndarray]:
    """Return the keys of a shard's samples in raw order, and whether each is chosen, as a folder of choices says.

    Raises:
        MissingFileError, UserError: the file is not there, or damaged; names it.
    """
    table = read_table(directory / f"{shard}.parquet", ["key", "chosen"], mend=MEND_SHARD)
    return table["key"].to_pylist(), np.asarray(table["chosen"])


def choice_identity(hashes: Mapping[str, str], scale: float | None) -> str:
    """Return what a shard's choice is made of, as its report has it under `source`.

    Args:
        hashes: by the name of its folder, the SHA-256 of each file of columns that is read.
        scale: what weights are relative to, `extra[SCALE]` of the manifest.
    """
    return sha256_text(json.dumps([dict(sorted(hashes.items())), scale], sort_keys=True))


def relative_weights(weight: np.ndarray | None, scale: float | None, *, temperature: float | None) -> np.ndarray | None:
    """Return the weights that samples are drawn by: with a temperature exp(weight / temperature), in parts of the
    largest, and never less than float32 can say; else as they are.

    Args:
        weight: NaN where it is unknown, [n].
        scale: the largest of all that are chosen.
    """
    if weight is None or scale is None or temperature is None:
        return weight
    exponents = (weight - scale) / temperature
    # What is not chosen may be larger.
    return np.maximum(np.exp(np.minimum(exponents, 0.0)), LEAST_FLOAT32)


def _scale(total: ChoiceCounts, choice: Choice) -> float | None:
    """Return the largest weight, which those with a temperature are relative to: exp of it may be no number."""
    has_temperature = choice.settings.weight_temperature is not None
    return total.weight.most if has_temperature and total.weight is not None else None


def _is_done(choice: Choice, output: ShardDirectory, shard: str, scale: float | None) -> bool:
    return output.is_done(shard, choice_identity(choice.hashes(shard), scale), choice.settings.fingerprint)


def _write_shard(choice: Choice, output: ShardDirectory, found: ShardChoice, scale: float | None) -> None:
    path = output.file(found.shard, ".parquet")
    columns = {"key": found.keys, "chosen": pa.array(found.chosen)}
    weights = {"weight": relative_weights(found.weight, scale, temperature=choice.settings.weight_temperature)}
    weights |= {f"weight.{column}": values for column, values in found.caption_weights.items()}
    for name, values in weights.items():
        of_all = np.full(len(found.chosen), np.nan) if values is None else values
        is_null = ~found.chosen | np.isnan(of_all)
        columns[name] = pa.array(np.where(is_null, 0.0, of_all).astype(np.float32), mask=is_null)
    output.clear_marker(found.shard)
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns).combine_chunks(), temporary, compression="zstd")
    num_left_out = found.counts.num_samples - found.counts.num_chosen
    report = ShardReport(
        name=found.shard,
        source=choice_identity(choice.hashes(found.shard), scale),
        num_read=found.counts.num_samples,
        num_kept=found.counts.num_chosen,
        rejected={NOT_CHOSEN: num_left_out} if num_left_out else {},
        files={".parquet": sha256_file(path)},
        details={COUNTS: found.counts.to_json()},
    )
    output.write_marker(report, choice.settings.fingerprint)


def _write_manifest(choice: Choice, output: ShardDirectory, names: Sequence[str], scale: float | None) -> Manifest:
    hashes = {name: choice.hashes(name) for name in names}
    folders = sorted({folder for found in hashes.values() for folder in found})
    upstream = {
        folder: sha256_text(json.dumps({name: found.get(folder) for name, found in hashes.items()}))
        for folder in folders
    }
    fingerprint = choice.settings.fingerprint
    reports = {name: output.report(name, fingerprint) for name in output.marked()}
    counts = {name: ChoiceCounts.from_json(found.details[COUNTS]) for name, found in reports.items() if found}
    total = sum_counts(counts.values())
    extra = {
        "where": choice.settings.where,
        SCALE: scale,
        **total.to_json(),
        "by_source": {
            source: {"num_samples": found.num_samples, "num_chosen": found.num_chosen}
            for source, found in by_source(counts).items()
        },
    }
    return output.write_manifest(fingerprint, names, upstream=upstream, extra=extra)


def _counts(manifest: Manifest, names: Sequence[str]) -> Mapping[str, ChoiceCounts]:
    return {name: ChoiceCounts.from_json(manifest.shards[name].details[COUNTS]) for name in names}

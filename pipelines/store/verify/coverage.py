"""Checks between the directories of a run: no shard is missing, texts are of these captions, keys are joined."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pandas.util import hash_array

from pipelines.as_typed import ANY, typed_command, typed_flag
from pipelines.columns.caption_columns import RunCaptions
from pipelines.raw.shard_names import shard_name
from pipelines.store.families import FamilySchema, caption_columns, schema_of
from pipelines.store.manifest import Manifest
from pipelines.store.verify.findings import Findings, Problem

DIGITS = re.compile(r"\d+")


def check_coverage(run: Path, findings: Findings, raw_shards: Sequence[str]) -> None:
    """Check that no shard of a directory's input, `raw_shards` or captions, is missing between those it has done."""
    captions = findings.manifests.get(run / "captions")
    of_run = RunCaptions(run, findings.manifests)
    remembered = [shard_name(path) for path in raw_shards]
    for directory, manifest in findings.manifests.items():
        upstream = manifest.upstream.get("captions") if directory.parent == run / "features" else None
        columns = caption_columns(manifest)
        digest = None if upstream is None else of_run.texts_digest(columns)
        if upstream is not None and digest is not None:
            if upstream != digest:
                folders = " and ".join(str(column.folder) for column in of_run.folders(columns))
                text = f"made from captions {upstream}, but {folders} is {digest}"
                mend = f"`{_features(run)}` encodes what has changed"
                findings.problems.append(Problem(directory=directory, text=text, mend=mend))
            mend = f"`{typed_command('caption', {'run': run})}` with {typed_flag('shards')} of it, too"
            findings.problems += [
                Problem(directory=directory, shard=name, text=f"{column.folder} has no such shard", mend=mend)
                for column in of_run.folders(columns)
                for name in sorted(manifest.shards.keys() - column.manifest.shards.keys())
            ]
        expected = list(captions.shards) if upstream is not None and captions else remembered
        if directory.parent == run / "features" or directory == run / "captions":
            text = "missing, though shards before and after it are there"
            command = typed_command("caption", {"run": run}) if directory == run / "captions" else _features(run)
            mend = f"`{command}` with {typed_flag('shards')} of all of them"
            findings.problems += [
                Problem(directory=directory, shard=name, text=text, mend=mend)
                for name in missing_between(expected, manifest.shards)
            ]


def _features(run: Path) -> str:
    return typed_command("features", {"stage": ANY, "run": run})


def missing_between(expected: Sequence[str], found: Mapping[str, object]) -> list[str]:
    """Return the names of `expected` that `found` lacks between others that differ from them in numbers alone."""
    series: dict[str, list[str]] = {}
    for name in sorted(expected):
        series.setdefault(DIGITS.sub("#", name), []).append(name)
    missing = []
    for names in series.values():
        positions = [position for position, name in enumerate(names) if name in found]
        if positions:
            missing += [name for name in names[positions[0] : positions[-1]] if name not in found]
    return missing


def check_families(run: Path, findings: Findings, *, are_all_finished: bool) -> None:
    """Count the keys that lead and those that are joined to them, and look for keys that several shards have.

    That a family lacks another is a problem only when `are_all_finished`: it may be among the unfinished.
    """
    families: dict[Path, FamilySchema] = {}
    for path, manifest in findings.manifests.items():
        if path.parent == run / "features" and (family := schema_of(manifest)) is not None:
            families[path] = family
    leading = [path for path, family in families.items() if family.leads]
    joined = [path for path in families if path not in leading]
    bad = {(problem.directory, problem.shard) for problem in findings.problems}
    shards = {path: [name for name in findings.manifests[path].shards if (path, name) not in bad] for path in families}
    conditions = [path for path, family in families.items() if family.null_file is not None]
    for directory in leading:
        kept = {name: _kept_keys(directory / f"{name}.parquet") for name in shards[directory]}
        if repeated := _count_repeated(kept):
            count, key, names = repeated
            findings.notes.append(
                f"{directory}: {count:,} keys are in more than one shard, such as {key} in {' and '.join(names)}; "
                "training takes them for different samples"
            )
        for other in (path for path in joined if not _has_other_images(findings.manifests, directory, path)):
            findings.notes.append(_joined(kept, directory, families, other=other, names=shards[other]))
        for name, keys in kept.items():
            has_condition = any(name in findings.manifests[path].shards for path in conditions)
            # Crops of images, whose index has no labels, are for a codec, which has no condition.
            has_condition |= "label" not in families[directory].columns.names
            if are_all_finished and not has_condition and len(keys) and not _has_labels(directory / f"{name}.parquet"):
                text = f"it has {families[directory].name}, but neither text nor class labels: no stage can train on it"
                mend = f"`{typed_command('caption', {'run': run})}` and `{_features(run)}`"
                findings.problems.append(Problem(directory=directory, shard=name, text=text, mend=mend))
    if not are_all_finished:
        return
    known = {name for path in leading for name in findings.manifests[path].shards}
    names_of_leading = " or ".join(sorted({families[path].name for path in leading})) or "latents"
    for path in joined:
        alone = [name for name in findings.manifests[path].shards if name not in known]
        text = f"it has {families[path].name}, but no {names_of_leading}"
        mend = f"`{_features(run)}` with {typed_flag('shards')} of it"
        findings.problems += [Problem(directory=path, shard=name, text=text, mend=mend) for name in alone]


def _has_other_images(manifests: Mapping[Path, Manifest], first: Path, second: Path) -> bool:
    """Whether two families are made of the images at different resolutions; one that has none goes with all."""
    resolutions = [manifests[path].extra.get("resolution") for path in (first, second)]
    return None not in resolutions and resolutions[0] != resolutions[1]


def _joined(
    kept: Mapping[str, pa.Array],
    leading: Path,
    families: Mapping[Path, FamilySchema],
    *,
    other: Path,
    names: Sequence[str],
) -> str:
    """Say how many keys two families share; `kept` are those of the leading one by shard."""
    both = [name for name in kept if name in names]
    counts = np.zeros(3, np.int64)
    for name in both:
        counts += _join(kept[name], _kept_keys(other / f"{name}.parquet"))
    first, second = families[leading].name, families[other].name
    return (
        f"{leading.name} and {other.name}: {len(both)} shards in both; {counts[0]:,} keys in both, "
        f"{counts[1]:,} with {first} but no {second}, {counts[2]:,} with {second} but no {first}"
    )


def _kept_keys(index: Path) -> pa.Array:
    table = pq.read_table(index, columns=["key", "reject"])
    keys = table.filter(pc.field("reject").is_null()).column("key").combine_chunks()
    return keys.unique()


def _has_labels(index: Path) -> bool:
    labels = pq.read_table(index, columns=["label"]).column("label")
    return labels.null_count < len(labels)


def _join(first: pa.Array, second: pa.Array) -> tuple[int, int, int]:
    num_both = int(pd.Index(first).isin(pd.Index(second)).sum())
    return num_both, len(first) - num_both, len(second) - num_both


def _count_repeated(keys: Mapping[str, pa.Array]) -> tuple[int, str, list[str]] | None:
    """Return how many keys several shards have, the first of them and its shards; None if there are none."""
    # 8 bytes a key, so that 100 million fit; equal hashes are looked at again.
    hash_keys = cast(Callable[[np.ndarray], np.ndarray], hash_array)  # untyped in pandas
    hashes = {name: hash_keys(shard.to_numpy(zero_copy_only=False)) for name, shard in keys.items()}
    values, counts = np.unique(np.concatenate([*hashes.values(), np.zeros(0, np.uint64)]), return_counts=True)
    suspects = values[counts > 1]
    if not len(suspects):
        return None
    shards: dict[str, list[str]] = {}
    for name, shard in keys.items():
        for position in np.flatnonzero(np.isin(hashes[name], suspects)):
            shards.setdefault(shard[int(position)].as_py(), []).append(name)
    repeated = {key: names for key, names in shards.items() if len(names) > 1}
    if not repeated:
        return None
    first = min(repeated)
    return len(repeated), first, repeated[first]

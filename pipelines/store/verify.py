"""`make verify RUN=…`: whether every file of a run is the one that was written, and every sample accounted for."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pandas.util import hash_array
from rich.markup import escape
from rich.table import Table

from errors import MissingFileError
from pipelines.command import run_command
from pipelines.engine.progress import console, progress_bar
from pipelines.raw.shards import recall_shards, shard_name
from pipelines.store.families import FamilySchema, schema_of, texts_digest
from pipelines.store.feature_check import Fault, check_index, find_damage, read_index
from pipelines.store.files import sha256_file
from pipelines.store.manifest import MANIFEST_NAME, Manifest, ShardDirectory, ShardReport, read_manifest

NUM_READERS = 8
MAX_SHOWN = 20
DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong, as it is shown: the first bad key of a shard, the first bad shards of a directory."""

    directory: Path
    shard: str | None = None
    key: str | None = None
    text: str

    def __str__(self) -> str:
        names = [str(self.directory), self.shard and f"shard {self.shard}", self.key and f"key {self.key}"]
        return ": ".join([", ".join(name for name in names if name), self.text])


@dataclass
class Findings:
    """What a check of a run found: `problems` are errors, `notes` are worth knowing."""

    manifests: dict[Path, Manifest] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_run(run: Path) -> Findings:
    """Check every directory of `run` that has a manifest.

    Raises:
        MissingFileError: the run does not exist or nothing of it has finished.
    """
    directories = sorted(path.parent for pattern in ("*", "*/*") for path in run.glob(f"{pattern}/{MANIFEST_NAME}"))
    if not directories:
        raise MissingFileError(f"{run}: nothing has finished here, there is no {MANIFEST_NAME}")
    findings = Findings()
    for directory in directories:
        try:
            findings.manifests[directory] = read_manifest(directory)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            findings.problems.append(Problem(directory=directory, text=f"{MANIFEST_NAME} cannot be used: {error}"))
    for directory in sorted(path.parent for pattern in ("*", "features/*") for path in run.glob(f"{pattern}/.done")):
        if not (directory / MANIFEST_NAME).is_file():
            findings.problems.append(
                Problem(directory=directory, text=f"no {MANIFEST_NAME}: what writes here has not finished")
            )
    for directory, manifest in findings.manifests.items():
        findings.problems += _check_counts(directory, manifest)
        findings.problems += _check_shards(directory, manifest)
        findings.notes += _find_strangers(directory, manifest)
    _check_coverage(run, findings)
    _check_families(run, findings)
    return findings


def _check_counts(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    reports = manifest.shards.values()
    for name, total in (
        ("num_read", sum(report.num_read for report in reports)),
        ("num_kept", sum(report.num_kept for report in reports)),
    ):
        if getattr(manifest, name) != total:
            text = f"{name} is {getattr(manifest, name)}, but its shards add up to {total}"
            yield Problem(directory=directory, text=text)
    num_rejected = sum(manifest.rejected.values())
    if manifest.num_read != manifest.num_kept + num_rejected:
        text = f"{manifest.num_read} read, but {manifest.num_kept} kept and {num_rejected} rejected"
        yield Problem(directory=directory, text=text)


def _check_shards(directory: Path, manifest: Manifest) -> list[Problem]:
    def check(report: ShardReport) -> Problem | None:
        fault = _check_shard(ShardDirectory(directory), report, manifest)
        return fault and Problem(directory=directory, shard=report.name, key=fault.key, text=fault.text)

    problems = []
    with (
        ThreadPoolExecutor(NUM_READERS) as pool,
        progress_bar("verify", len(manifest.shards), unit="shards") as progress,
    ):
        for problem in pool.map(check, manifest.shards.values()):
            progress.advance(note=str(directory))
            problems += [problem] if problem else []
    return problems


def _find_strangers(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Say which files look like shards of a directory and are in no manifest: a glob over it would read them."""
    known = {f"{name}{suffix}" for name, report in manifest.shards.items() for suffix in report.files}
    suffixes = {Path(name).suffix for name in known}
    strangers = sorted(path.name for path in directory.iterdir() if path.suffix in suffixes and path.name not in known)
    if strangers:
        yield f"{directory}: {len(strangers):,} files are not in its {MANIFEST_NAME}, such as {strangers[0]}"


def _check_shard(directory: ShardDirectory, report: ShardReport, manifest: Manifest) -> Fault | None:
    paths = {suffix: directory.file(report.name, suffix) for suffix in report.files}
    for path in paths.values():
        if not path.is_file():
            return Fault(None, f"{path.name} is missing")
    changed = [suffix for suffix, path in paths.items() if sha256_file(path) != report.files[suffix]]
    fault = _check_features(paths, report, manifest, is_changed=bool(changed)) if ".tar" in paths else None
    if changed:
        names = " and ".join(paths[suffix].name for suffix in changed)
        reason = fault.text if fault else "the index and the samples it points at are sound"
        return Fault(fault.key if fault else None, f"SHA-256 of {names} is not the manifest's: {reason}")
    return fault


def _check_features(
    paths: Mapping[str, Path], report: ShardReport, manifest: Manifest, *, is_changed: bool
) -> Fault | None:
    family = schema_of(manifest)
    if family is None:
        return None
    index = read_index(paths[".parquet"], family)
    if isinstance(index, Fault):
        return index
    fault = check_index(index, report, family, tar_bytes=paths[".tar"].stat().st_size)
    if fault is not None or not is_changed:
        return fault
    tar = np.asarray(np.memmap(paths[".tar"], np.uint8, mode="r"))
    try:
        return find_damage(tar, index, family)
    except (ValueError, TypeError) as error:
        return Fault(None, f"the index does not fit the tar: {error}")


def _check_coverage(run: Path, findings: Findings) -> None:
    """Check that no shard of a directory's input is missing between those it has done."""
    captions = findings.manifests.get(run / "captions")
    remembered = [shard_name(path) for path in recall_shards(run)]
    for directory, manifest in findings.manifests.items():
        upstream = manifest.upstream.get("captions") if directory.parent == run / "features" else None
        if upstream is not None and captions is not None:
            digest = texts_digest(captions)
            if upstream != digest:
                text = f"made from captions {upstream}, but {run / 'captions'} is {digest}"
                findings.problems.append(Problem(directory=directory, text=text))
            findings.problems += [
                Problem(directory=directory, shard=name, text=f"{run / 'captions'} has no such shard")
                for name in sorted(manifest.shards.keys() - captions.shards.keys())
            ]
        expected = list(captions.shards) if upstream is not None and captions else remembered
        if directory.parent == run / "features" or directory == run / "captions":
            findings.problems += [
                Problem(directory=directory, shard=name, text="missing, though shards before and after it are there")
                for name in missing_between(expected, manifest.shards)
            ]


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


def _check_families(run: Path, findings: Findings) -> None:
    """Count the keys that lead and those that are joined to them, and look for keys that several shards have."""
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
            if not has_condition and len(keys) and not _has_labels(directory / f"{name}.parquet"):
                text = f"it has {families[directory].name}, but neither text nor class labels: no stage can train on it"
                findings.problems.append(Problem(directory=directory, shard=name, text=text))
    known = {name for path in leading for name in findings.manifests[path].shards}
    names_of_leading = " or ".join(sorted({families[path].name for path in leading})) or "latents"
    for path in joined:
        alone = [name for name in findings.manifests[path].shards if name not in known]
        text = f"it has {families[path].name}, but no {names_of_leading}"
        findings.problems += [Problem(directory=path, shard=name, text=text) for name in alone]


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


def print_findings(run: Path, findings: Findings) -> None:
    """Print one line per directory, the notes, and the first problems."""
    table = Table(title=f"verify, {run}", title_justify="left")
    for heading in ("directory", "shards", "read", "kept", "rejected", "bad shards"):
        table.add_column(heading, justify="left" if heading == "directory" else "right")
    for directory, manifest in findings.manifests.items():
        bad = {problem.shard for problem in findings.problems if problem.directory == directory and problem.shard}
        numbers = (
            len(manifest.shards),
            manifest.num_read,
            manifest.num_kept,
            sum(manifest.rejected.values()),
            len(bad),
        )
        table.add_row(escape(str(directory.relative_to(run))), *(f"{number:,}" for number in numbers))
    console.print(table)
    for note in findings.notes:
        console.print(note, markup=False, soft_wrap=True)
    for problem in findings.problems[:MAX_SHOWN]:
        console.print(f"[bold red]bad[/] {escape(str(problem))}", soft_wrap=True)
    if len(findings.problems) > MAX_SHOWN:
        console.print(f"and {len(findings.problems) - MAX_SHOWN} more")


def main() -> None:
    """Verify a run and print what was found; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.store.verify", description="Check the files of a run.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    run = parser.parse_args().run
    findings = verify_run(run)
    print_findings(run, findings)
    if findings.problems:
        sys.exit(1)
    console.print("every file is as it was written, and every sample is accounted for")


if __name__ == "__main__":
    sys.exit(run_command("verify", main))

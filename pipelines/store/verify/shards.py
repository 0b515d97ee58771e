"""Checks of a directory of shards: counts, markers, and the files of each shard against their hashes."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.store.families import schema_of
from pipelines.store.feature_check import Fault, check_index, find_damage, read_index
from pipelines.store.files import sha256_file
from pipelines.store.manifest import MARKER_FOLDER, Fingerprint, Manifest, ShardReport
from pipelines.store.state_files import read_state, state_damage
from pipelines.store.verify.findings import Check, Problem
from pipelines.store.verify.folders import MARKER_KEYS, Folder
from pipelines.store.verify.kinds import ANEW


def check_counts(folder: Folder) -> Iterator[Problem]:
    """Compare the sums of a manifest with its shards', and its digest with its fields."""
    manifest = folder.manifest
    if manifest is None:
        return
    mend = folder.mend("`rm {path}`, then `{command}`: it is summed up anew", folder.path / folder.manifest_name)
    reports = manifest.shards.values()
    for name, total in (
        ("num_read", sum(report.num_read for report in reports)),
        ("num_kept", sum(report.num_kept for report in reports)),
    ):
        if getattr(manifest, name) != total:
            text = f"{name} is {getattr(manifest, name)}, but its shards add up to {total}"
            yield folder.problem(text, mend=mend)
    num_rejected = sum(manifest.rejected.values())
    if manifest.num_read != manifest.num_kept + num_rejected:
        text = f"{manifest.num_read} read, but {manifest.num_kept} kept and {num_rejected} rejected"
        yield folder.problem(text, mend=mend)
    if Fingerprint.of(manifest.fingerprint.fields).digest != manifest.fingerprint.digest:
        yield folder.problem(f"the fingerprint of {folder.manifest_name} is not that of its fields", mend=mend)


def marker_checks(folder: Folder) -> Iterator[Check]:
    """Compare each marker with the manifest; those of other settings than the manifest's are only read."""
    for shard, path in folder.markers().items():
        yield Check(directory=folder.path, shard=shard, files=(path,), look=partial(_check_marker, folder, shard, path))
    if folder.manifest is None:
        return
    for shard in sorted(folder.reports.keys() - folder.markers().keys()):
        path = folder.path / MARKER_FOLDER / f"{shard}.json"
        text = f"its marker {path.relative_to(folder.path)} does not exist, so that it counts as not done"
        problem = folder.problem(text, shard=shard, mend=f"`{folder.command}` does it again")
        yield Check(directory=folder.path, shard=shard, look=lambda problem=problem: problem)


def _check_marker(folder: Folder, shard: str, path: Path) -> Problem | None:
    mend = folder.mend("`rm {path}`, then `{command}`: the shard is done again", path)
    name = path.relative_to(folder.path)
    if damage := state_damage(path, keys=MARKER_KEYS):
        return folder.problem(f"{name} {damage}", shard=shard, mend=mend)
    content = read_state(path, mend=mend, keys=MARKER_KEYS)
    try:
        report = ShardReport(**content["report"])
    except (TypeError, AssertionError, AttributeError) as error:
        return folder.problem(f"{name} is damaged ({error})", shard=shard, mend=mend)
    manifest = folder.manifest
    if manifest is None or content["fingerprint"] != manifest.fingerprint.digest or shard not in manifest.shards:
        return None
    if report != manifest.shards[shard]:
        return folder.problem(f"{name} and {folder.manifest_name} say different things of it", shard=shard, mend=mend)
    return None


def shard_checks(folder: Folder) -> Iterator[Check]:
    """Compare the files of each shard with their hashes; features also with their index."""
    for report in folder.reports.values():
        files = tuple(folder.path / f"{report.name}{suffix}" for suffix in report.files)
        if files:
            look = partial(_check_shard, folder, report)
            yield Check(directory=folder.path, shard=report.name, files=files, look=look)


def _check_shard(folder: Folder, report: ShardReport) -> Problem | None:
    paths = {suffix: folder.path / f"{report.name}{suffix}" for suffix in report.files}
    for path in paths.values():
        if not path.is_file():
            return folder.problem(
                f"{path.name} is missing", shard=report.name, mend=f"`{folder.command}` makes it anew"
            )
    changed = [suffix for suffix, path in paths.items() if sha256_file(path) != report.files[suffix]]
    manifest = folder.manifest
    fault = None
    if ".tar" in paths and manifest is not None:
        fault = _check_features(paths, report, manifest, is_changed=bool(changed))
    first = paths[changed[0]] if changed else next(iter(paths.values()))
    mend = folder.mend(ANEW, first)
    if changed:
        names = " and ".join(paths[suffix].name for suffix in changed)
        whose = "the manifest's" if manifest is not None else "its marker's"
        reason = fault.text if fault else "it has changed since it was written"
        text = f"SHA-256 of {names} is not {whose}: {reason}"
        return folder.problem(text, shard=report.name, key=fault.key if fault else None, mend=mend)
    return fault and folder.problem(fault.text, shard=report.name, key=fault.key, mend=mend)


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
    if paths[".tar"].stat().st_size == 0:
        return Fault(None, "the tar is empty")
    tar = np.asarray(np.memmap(paths[".tar"], np.uint8, mode="r"))
    try:
        return find_damage(tar, index, family)
    except (ValueError, TypeError) as error:
        return Fault(None, f"the index does not fit the tar: {error}")

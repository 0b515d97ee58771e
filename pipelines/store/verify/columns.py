"""Checks of columns about samples, and of choices by them: they are of the raw shards' samples, and of each other."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.as_typed import typed_flag
from pipelines.columns.written_choices import SCALE, choice_identity
from pipelines.raw.shard_headers import HeaderCache, ShardHeaders
from pipelines.raw.shard_names import shard_name
from pipelines.store.manifest import Manifest
from pipelines.store.verify.coverage import missing_between
from pipelines.store.verify.findings import Findings, Problem
from pipelines.store.verify.kinds import ANEW, CAPTIONS, CHOICES, CLAIMS, SCORE, FolderKind, match_place

# Each has a row of every sample of a shard, in raw order.
OF_SAMPLES = (CAPTIONS, CLAIMS, SCORE, CHOICES)


def check_columns(run: Path, findings: Findings, raw_shards: Sequence[str]) -> None:
    """Check that columns and choices are of the samples that there are, and choices of the columns that there are.

    What is only old, and is made anew by the command that makes it, is a note.
    """
    folders = {
        path: (kind, kind.door.command(run, groups))
        for path in findings.manifests
        for kind, groups in _kinds(path.relative_to(run).as_posix())
    }
    headers = HeaderCache(run)
    paths = {shard_name(path): path for path in raw_shards}
    for path, (kind, command) in folders.items():
        manifest = findings.manifests[path]
        if kind in (CLAIMS, SCORE):
            text = "missing, though shards before and after it are there"
            mend = f"`{command}` with {typed_flag('shards')} of all of them"
            findings.problems += [
                Problem(directory=path, shard=name, text=text, mend=mend)
                for name in missing_between(sorted(paths), manifest.shards)
            ]
        for text in (_old_score(manifest, headers, paths), _old_choice(run, manifest, findings.manifests)):
            findings.notes += [f"{path}: {text}: `{command}` makes them anew"] if text else []
    findings.problems += _other_samples(findings, folders, headers, paths)


def _kinds(name: str) -> Iterator[tuple[FolderKind, dict[str, str]]]:
    """Yield the kind of a folder with the groups of its place, if it is one with a row of every sample."""
    for kind in OF_SAMPLES:
        if (groups := match_place(kind, name)) is not None:
            yield kind, groups
            return


def _old_score(manifest: Manifest, headers: HeaderCache, paths: Mapping[str, str]) -> str | None:
    """Return what is said of a score of images of which some shards were others, as far as headers are remembered."""
    if manifest.extra.get("score", {}).get("needs") != "image":
        return None  # what else it is made from is in its identity, too
    known = {name: headers.summary(paths[name]) for name in manifest.shards if name in paths}
    old = sorted(name for name, one in known.items() if one and one.identity != manifest.shards[name].source)
    return _said(old, manifest, "shards were made from other raw shards")


def _old_choice(run: Path, manifest: Manifest, manifests: Mapping[Path, Manifest]) -> str | None:
    """Return what is said of a choice of which some columns have been made anew since, or are gone."""
    if SCALE not in manifest.extra:
        return None  # no choice
    folders = {name: manifests.get(run / name) for name in manifest.upstream}
    old = []
    for name, report in manifest.shards.items():
        hashes = {
            folder: own.shards[name].files.get(".parquet", "")
            for folder, own in folders.items()
            if own is not None and name in own.shards
        }
        if choice_identity(hashes, manifest.extra[SCALE]) != report.source:
            old.append(name)
    return _said(sorted(old), manifest, "shards were chosen by other columns")


def _said(old: Sequence[str], manifest: Manifest, what: str) -> str | None:
    return f"{len(old):,} of {len(manifest.shards):,} {what} than there are now, first {old[0]}" if old else None


def _other_samples(
    findings: Findings,
    folders: Mapping[Path, tuple[FolderKind, str]],
    headers: HeaderCache,
    paths: Mapping[str, str],
) -> Iterator[Problem]:
    """Yield a problem for each file whose rows are not of a shard's samples, in their order."""
    bad = {(problem.directory, problem.shard) for problem in findings.problems}
    for shard in sorted({name for path in folders for name in findings.manifests[path].shards}):
        files = [path / f"{shard}.parquet" for path in folders if shard in findings.manifests[path].shards]
        files = [file for file in files if (file.parent, shard) not in bad]
        keys = {file: pq.read_table(file, columns=["key"])["key"].combine_chunks() for file in files}
        found = headers.headers(paths[shard]) if shard in paths else None
        known = _keys_of(found) if found is not None else None
        expected, of_whom = known, paths.get(shard, "")
        for file, own in keys.items():
            if expected is None:
                expected, of_whom = own, str(file)
            elif not own.equals(expected):
                mend = ANEW.format(path=file, command=folders[file.parent][1])
                text = f"its rows are not the samples of {of_whom}: {_difference(own, expected)}"
                yield Problem(directory=file.parent, shard=shard, text=text, mend=mend)


def _keys_of(headers: ShardHeaders) -> pa.Array | None:
    """Return the keys of a raw shard, as far as its headers have them: of rows they may not."""
    if len(headers.samples) != headers.summary.num_samples:
        return None
    return pa.array([sample.key for sample in headers.samples], pa.string())


def _difference(own: pa.Array, expected: pa.Array) -> str:
    if len(own) != len(expected):
        return f"it has {len(own):,} rows, and there are {len(expected):,} samples"
    pairs = zip(own.to_pylist(), expected.to_pylist(), strict=True)
    row = next(number for number, (key, other) in enumerate(pairs) if key != other)
    return f"row {row + 1:,} is of {own[row].as_py()!r}, and the sample there is {expected[row].as_py()!r}"

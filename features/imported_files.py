"""Features that were made elsewhere: one file a sample, in folders or tars, found by the sample's key.

PixArt's extraction names the file of `a/b/7.png` after its folder, `a/b_7.npz` or `b_7.npy`, or without it, `7.npz`;
its readers of SA-1B have `sa_7.npz`.
"""

import contextlib
import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from errors import MissingFileError, UserError
from features.jobs import FeatureInputs
from features.writer import SampleToWrite, write_samples
from pipelines.as_typed import typed_path
from pipelines.engine.pieces import Piece, PieceReport, Source
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject
from pipelines.raw.kinds.tar_shards import TarMembers
from pipelines.raw.patterns import GLOB, expand_braces
from pipelines.raw.reading import AS_IT_COMES, Reading
from pipelines.raw.samples import Member
from pipelines.raw.shard_headers import HeaderCache
from pipelines.raw.shard_names import shard_name
from pipelines.raw.shards import open_shard
from pipelines.raw.summaries import read_headers, recall_headers
from pipelines.store.families import FamilySchema
from pipelines.store.files import is_remote, open_ranges
from pipelines.store.remote import list_urls

NAMED = 3  # of samples without a file
MISSING, CORRUPT, WRONG_SHAPE = "missing_feature", "corrupt_feature", "wrong_shape"
# Of values that no encoder of ours has made: none wider would hold more of them.
IMPORTED_DTYPE = "float32"

log = get_logger("features")


@dataclass(frozen=True, kw_only=True)
class FeaturePlaces:
    """Folders and tars that hold files of samples; `run` is where headers of tars are remembered.

    Attributes:
        suffixes: that such a file may have, in the order in which they are looked for.
        missing: the reason of a sample without a file.
    """

    folders: tuple[str, ...]
    tars: tuple[str, ...]
    suffixes: tuple[str, ...]
    run: Path
    missing: str = MISSING

    def __str__(self) -> str:
        return f"file .{'/.'.join(self.suffixes)}"


def find_places(
    address: str, *, suffixes: tuple[str, ...], run: Path, key: str, missing: str = MISSING
) -> FeaturePlaces:
    """Return the folders and tars that a recipe's `key` means by a path, a pattern or a URL.

    Raises:
        MissingFileError: there are none.
        UserError: something else is among them.
    """
    address = address.replace("{run}", str(run))
    if is_remote(address):
        parts = expand_braces(address)
        found = [url for part in parts for url in (list_urls(part) if set(part) & set(GLOB) else [part])]
    else:
        path = typed_path(address)
        root = Path(path.anchor or ".")
        patterns = (
            [] if path.exists() else [str(Path(part).relative_to(path.anchor)) for part in expand_braces(str(path))]
        )
        found = [str(path)] if path.exists() else [str(match) for pattern in patterns for match in root.glob(pattern)]
    tars = [place for place in found if place.lower().endswith(".tar")]
    folders = [str(Path(place).absolute()) for place in found if not is_remote(place) and Path(place).is_dir()]
    if not found:
        raise MissingFileError(f"{key} = {address!r}: there is no such folder or tar")
    if others := sorted(set(found) - set(tars) - {place for place in found if Path(place).is_dir()}):
        raise UserError(f"{key} = {address!r}: {others[0]} is neither a folder on a mounted disk nor a tar")
    return FeaturePlaces(
        folders=tuple(sorted(folders)),
        tars=tuple(sorted(tars)),
        suffixes=suffixes,
        run=run.absolute(),
        missing=missing,
    )


class FeatureFiles:
    """The files of the samples of one shard; `open_files` gives one."""

    def __init__(self, places: FeaturePlaces, tars: Sequence["_Tar"]) -> None:
        self._places, self._tars = places, tars

    def find(self, key: str) -> str | None:
        """Return which file is that of a sample, or None."""
        for name in feature_names(key):
            for folder in self._places.folders:
                for suffix in self._places.suffixes:
                    path = f"{folder}/{name}.{suffix}"
                    if Path(path).is_file():
                        return path
            for tar in self._tars:
                if name in tar.members:
                    return f"{tar.path}\0{name}"
        return None

    def read(self, key: str) -> bytes:
        """Return the bytes of the file of a sample.

        Raises:
            SampleReject: there is none, with the reason of its places.
        """
        if (found := self.find(key)) is None:
            raise SampleReject(self._places.missing)
        path, _, name = found.partition("\0")
        if not name:
            return Path(path).read_bytes()
        tar = next(tar for tar in self._tars if tar.path == path)
        return tar.content.read(tar.members[name])

    def stamp(self, found: str) -> str:
        """Return what changes when a file does, its name in it, but not where it lies."""
        path, _, name = found.partition("\0")
        if name:
            tar = next(tar for tar in self._tars if tar.path == path)
            return f"{name} {tar.identity}"
        status = Path(path).stat()
        return f"{Path(path).name} {status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True, kw_only=True)
class _Tar:
    path: str
    identity: str
    members: dict[str, Member]
    content: TarMembers


@contextlib.contextmanager
def open_files(places: FeaturePlaces, shard: str) -> Iterator[FeatureFiles]:
    """Open the files of features for the samples of a shard: of tars that of its name, if there is one, else all.

    Raises:
        UserError, StorageError: a tar cannot be read; names it.
    """
    own = [tar for tar in places.tars if shard_name(tar) == shard]
    with contextlib.ExitStack() as stack:
        tars = []
        for path in own or places.tars:
            file = stack.enter_context(open_ranges(path))
            cache = HeaderCache(places.run)
            headers = recall_headers(path, file, AS_IT_COMES, cache=cache)
            if headers is None:
                headers = read_headers(path, file, AS_IT_COMES)
                cache.remember(path, headers)
            kept: dict[str, Member] = {}
            for sample in headers.samples:
                members = (sample.members.get(suffix) for suffix in places.suffixes)
                if (member := next(filter(None, members), None)) is not None:
                    kept[sample.key] = member
            identity = headers.summary.identity
            tars.append(_Tar(path=path, identity=identity, members=kept, content=TarMembers(path, file)))
        yield FeatureFiles(places, tars)


def import_piece(
    piece: Piece,
    store: Callable[[SampleToWrite, FeatureFiles], None],
    *,
    family: FamilySchema,
    places: FeaturePlaces,
    reading: Reading,
    row: Mapping[str, Any],
) -> PieceReport:
    """Write a piece as `write_samples` does; `store` is given the files at `places`, too."""
    with open_files(places, piece.source.name) as files:
        return write_samples(
            piece, lambda item: store(item, files), family=family, reading=reading, run=places.run, row=row
        )


def feature_names(key: str) -> list[str]:
    """Return what the file of a sample may be called, without its suffix, the most exact first."""
    folder, _, stem = key.rpartition("/")
    if not folder:
        return [key]
    last = folder.rpartition("/")[2]
    return list(dict.fromkeys([key, f"{folder}_{stem}", f"{last}_{stem}", stem]))


def imported_sources(places: FeaturePlaces, inputs: FeatureInputs, *, key: str) -> list[Source]:
    """Describe the raw shards with the files of their samples: an identity changes when one of the files does.

    Raises:
        UserError: no sample has a file, or one file would be that of two samples; names them and `key`.
    """
    claims = array("Q")
    sources: list[Source] = []
    missing: list[str] = []
    num_missing = 0
    for source in inputs.raw:
        digest = hashlib.sha256(source.identity.encode())
        for sample_key, found, stamp in _found(places, source, inputs):
            digest.update(f"{sample_key}\0{stamp}\n".encode())
            if found is not None:
                claims.append(_hash(found))
                continue
            num_missing += 1
            missing += [f"{source.name}/{sample_key}"] if len(missing) < NAMED else []
        sources.append(replace(source, identity=digest.hexdigest()))
    if num_missing:
        _say_missing(places, missing, num_missing=num_missing, num_samples=num_missing + len(claims), key=key)
    values, counts = np.unique(np.frombuffer(claims, np.uint64), return_counts=True)
    if (counts > 1).any():
        _refuse_shared(places, inputs, int(values[counts > 1][0]), key=key)
    return sources


def _say_missing(
    places: FeaturePlaces, missing: Sequence[str], *, num_missing: int, num_samples: int, key: str
) -> None:
    names = " or ".join(feature_names(missing[0].partition("/")[2]))
    some = f"such as {', '.join(missing)}; the first was looked for as {names}"
    if num_missing == num_samples:
        raise UserError(f"{key}: none of the {num_samples:,} samples has a {places} there, {some}")
    log.warning(f"{key}: {num_missing:,} of the {num_samples:,} samples have no {places} there, {some}")


def _found(
    places: FeaturePlaces, source: Source, inputs: FeatureInputs
) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield each sample's key, its file and the stamp of that."""
    with (
        open_shard(source.path, inputs.data.reading, run=inputs.run, identity=source.identity) as raw,
        open_files(places, source.name) as files,
    ):
        for sample in raw.samples:
            found = files.find(sample.key)
            yield sample.key, found, None if found is None else files.stamp(found)


def _hash(found: str) -> int:
    return int.from_bytes(hashlib.sha256(found.encode()).digest()[:8], "little")


def _refuse_shared(places: FeaturePlaces, inputs: FeatureInputs, shared: int, *, key: str) -> None:
    samples = []
    for source in inputs.raw:
        samples += [
            (f"{source.name}/{sample_key}", found)
            for sample_key, found, _ in _found(places, source, inputs)
            if found is not None and _hash(found) == shared
        ]
    (first, found), (second, _), *_ = samples
    raise UserError(f"{key}: {found.replace(chr(0), ' ')} would be of {first} and of {second}: which one is not clear")

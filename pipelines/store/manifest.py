"""Markers and manifests: what was done, with which settings, from which source, and where every sample went."""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_json, fsync_directory, is_file_itself, remove_temporary_files, take_away
from pipelines.store.state_files import parse_state, read_state, state_of

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
# Of captions, whose other visible files are Parquet of one schema: what reads such a folder as a whole, as
# pandas and `datasets` do, passes over hidden files.
TABLES_MANIFEST_NAME = ".manifest.json"
FOLDER_OF_TABLES = "captions"
MARKER_FOLDER = ".done"
_NOTHING = object()

log = get_logger("store")


@dataclass(frozen=True)
class Fingerprint:
    """The settings that decide a room's output bytes; equal digests mean equal outputs from equal inputs."""

    fields: dict[str, Any]
    digest: str

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Fingerprint":
        """Make a fingerprint of JSON values (config, model id and revision, code version of the room)."""
        canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return cls(json.loads(canonical), hashlib.sha256(canonical.encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What happened to one shard. `num_read == num_kept + sum(rejected.values())`, checked when it is made."""

    name: str
    source: str
    num_read: int
    num_kept: int
    rejected: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_rejected = sum(self.rejected.values())
        assert self.num_read == self.num_kept + num_rejected, (
            f"{self.name}: {self.num_read} read, but {self.num_kept} kept and {num_rejected} rejected"
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a directory: the sum of its shards' reports, and what a later room must agree with."""

    fingerprint: Fingerprint
    upstream: dict[str, str]
    num_read: int
    num_kept: int
    rejected: dict[str, int]
    shards: dict[str, ShardReport]
    extra: dict[str, Any]

    def fact(self, name: str, *, where: Any) -> Any:
        """Return what `extra` says of `name`.

        Raises:
            UserError: it says nothing; names the key, and `where` the manifest was read.
        """
        if name not in self.extra:
            raise UserError(
                f"{where}/{MANIFEST_NAME} does not say what {name!r} is: it is damaged, or of another version; "
                "remove it and type the command that makes this folder again: that writes it anew"
            )
        return self.extra[name]


class ShardDirectory:
    """A directory that one room writes: shard files, their markers under `.done/`, and the manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str, suffix: str) -> Path:
        """Return the path of a shard's file, such as `captions/laion_00000` + `.parquet`."""
        return self.path / f"{name}{suffix}"

    def known_as(
        self,
        fingerprint: Fingerprint,
        *,
        defaults: Mapping[str, Any],
        made_under: Iterable[Mapping[str, Any]] = (),
    ) -> Fingerprint:
        """Return `fingerprint`, which leaves out fields at their default, in the form in which this directory has it.

        Directories made before fingerprints did that go on with all of the former fields written out, so that what is
        in them stays done and known to later rooms by the same digest.

        Args:
            fingerprint: in today's form.
            defaults: the fields that were written out, those alone: a key that came later was in no fingerprint.
                `table.field` stands for a field of a table in the fingerprint.
            made_under: fields that may differ, as something in here has them; asked for only while there is no
                manifest, whose fields tell its form.
        """
        if manifest_path(self.path).is_file():
            found = read_manifest(self.path).fingerprint.fields
            if not any(_field(found, name) == value for name, value in defaults.items()):
                return fingerprint
            formerly = {name: value for name, value in defaults.items() if _field(found, name) is not _NOTHING}
            return Fingerprint.of(_written_out(fingerprint.fields, formerly))
        digests = set(self._digests())
        if not digests:
            return fingerprint
        former = Fingerprint.of(_written_out(fingerprint.fields, defaults))
        for fields in itertools.chain([{}], made_under):
            if Fingerprint.of({**former.fields, **fields}).digest in digests:
                return former
        return fingerprint

    def changes(self, fingerprint: Fingerprint, *, defaults: Mapping[str, Any]) -> list[str]:
        """Return `field: old -> new` of each field by which what is here differs from `fingerprint`.

        A missing field is what `defaults` say.
        """
        if not manifest_path(self.path).is_file():
            return []
        found, wanted = {**defaults, **read_manifest(self.path).fingerprint.fields}, {**defaults, **fingerprint.fields}
        names = sorted(found.keys() | wanted.keys())
        return [
            f"{name}: {found.get(name)} -> {wanted.get(name)}" for name in names if found.get(name) != wanted.get(name)
        ]

    def _digests(self) -> Iterator[str]:
        """Yield the fingerprints by which markers, parts, and captions set aside of an interrupted run are known."""
        for name in self.marked():
            yield self._read_marker(name)["fingerprint"]
        for note in (*self.path.glob(".*/*.json"), *self.path.glob(".*/*/*.report")):
            # Whoever needs one of them says what is wrong with it.
            if note.parent.name != MARKER_FOLDER and is_file_itself(note):
                with contextlib.suppress(UserError):
                    content = read_state(note, mend="")
                    yield str(content.get("fingerprint"))

    def marked(self) -> list[str]:
        """Return the names of the shards that have a marker of their own, sorted.

        A copy of one under another name is none, nor is a damaged or foreign file: whoever needs that shard is told.
        """
        return [name for name in self._marker_names() if self._is_own(name)]

    def _is_own(self, name: str) -> bool:
        with contextlib.suppress(UserError):
            return self.any_report(name).name == name
        return False

    def _marker_names(self) -> list[str]:
        folder = self.path / MARKER_FOLDER
        return sorted(
            path.relative_to(folder).with_suffix("").as_posix()
            for path in folder.rglob("*.json")
            if not path.name.startswith(".") and path.is_file()
        )

    def finished(self) -> list[str]:
        """Return the names of the shards that are done, sorted: those of the manifest, where there is one.

        Of a run that was interrupted it is those of the settings that it wrote last: others wait to be made anew.

        Raises:
            UserError: the manifest is damaged; names it.
        """
        if manifest_path(self.path).is_file():
            return sorted(read_manifest(self.path).shards)
        settings = {name: self._read_marker(name)["fingerprint"] for name in self.marked()}
        newest = max(settings, key=lambda name: self._marker(name).stat().st_mtime_ns, default=None)
        return [name for name, digest in settings.items() if digest == settings[newest]] if newest else []

    def _marker(self, name: str) -> Path:
        return self.path / MARKER_FOLDER / f"{name}.json"

    def _read_marker(self, name: str) -> dict[str, Any]:
        path = self._marker(name)
        content = read_state(path, mend=_mend_marker(name), keys=("fingerprint", "report"))
        state_of(dict[str, Any], content["report"], where=str(path), mend=_mend_marker(name))
        return content

    def report(self, name: str, fingerprint: Fingerprint) -> ShardReport | None:
        """Return the report of a shard finished under `fingerprint`, or None.

        Raises:
            UserError: the marker is damaged; names it.
        """
        marker = self._marker(name)
        if not marker.is_file():
            return None
        content = self._read_marker(name)
        if content["fingerprint"] != fingerprint.digest:
            return None
        report = state_of(ShardReport, content["report"], where=str(marker), mend=_mend_marker(name))
        return report if report.name == name else None

    def any_report(self, name: str) -> ShardReport:
        """Return the report of a shard that has a marker, under whatever settings it was made; raises as `report`."""
        mend = _mend_marker(name)
        return state_of(ShardReport, self._read_marker(name)["report"], where=str(self._marker(name)), mend=mend)

    def is_done(self, name: str, source_identity: str, fingerprint: Fingerprint) -> bool:
        """Whether marker, fingerprint and source identity of a shard match and its files are there."""
        report = self.report(name, fingerprint)
        return (
            report is not None
            and report.source == source_identity
            and all(self.file(name, suffix).is_file() for suffix in report.files)
        )

    def clear_leftovers(self, *, is_held: bool = False) -> None:
        """Remove what killed processes have left half-written here and among the markers.

        With `is_held`, the caller holds `exclusive` of this directory: everything of the kind; see
        `remove_temporary_files`.
        """
        for folder in (self.path, self.path / MARKER_FOLDER):
            remove_temporary_files(folder, is_held=is_held)

    def clear_marker(self, name: str) -> None:
        """Remove a stale marker, and with it the manifest that counted the shard.

        Raises:
            UserError: there is a folder of that name.
        """
        self.clear_manifest()
        _take_away_for_good(self._marker(name))

    def clear_manifest(self) -> None:
        """Remove the manifest, before what it vouches for is replaced; raises as `clear_marker` does."""
        for name in {manifest_path(self.path).name, MANIFEST_NAME}:
            _take_away_for_good(self.path / name)

    def write_marker(self, report: ShardReport, fingerprint: Fingerprint) -> None:
        """Declare a shard done; call it after the shard's files have been renamed into place."""
        content = {"fingerprint": fingerprint.digest, "report": dataclasses.asdict(report)}
        atomic_write_json(self._marker(report.name), content)

    def write_manifest(
        self,
        fingerprint: Fingerprint,
        names: Sequence[str],
        *,
        upstream: Mapping[str, str],
        extra: Mapping[str, Any],
    ) -> Manifest:
        """Write the manifest over `names` and every other shard of this directory with the same fingerprint."""
        reports = {name: self.report(name, fingerprint) for name in names}
        missing = [name for name in names if reports[name] is None]
        assert not missing, f"{self.path}: shards without a marker: {missing}"
        for name in set(self._marker_names()).difference(names):
            try:
                reports[name] = self.report(name, fingerprint)
            except UserError as error:
                log.warning(f"{error} (it is no shard of this command, and left out)")
        shards = {name: report for name, report in sorted(reports.items()) if report is not None}
        rejected: Counter[str] = Counter()
        for report in shards.values():
            rejected.update(report.rejected)
        manifest = Manifest(
            fingerprint=fingerprint,
            upstream=dict(upstream),
            num_read=sum(report.num_read for report in shards.values()),
            num_kept=sum(report.num_kept for report in shards.values()),
            rejected=dict(sorted(rejected.items())),
            shards=shards,
            extra=dict(extra),
        )
        assert manifest.num_read == manifest.num_kept + sum(rejected.values())
        path = self.path / _manifest_name(self.path)
        atomic_write_json(path, {"schema": SCHEMA_VERSION, **dataclasses.asdict(manifest)})
        if path.name != MANIFEST_NAME:
            _take_away_for_good(self.path / MANIFEST_NAME)
        return manifest


def _manifest_name(directory: Path) -> str:
    return TABLES_MANIFEST_NAME if directory.name.partition("@")[0] == FOLDER_OF_TABLES else MANIFEST_NAME


def manifest_path(directory: Path) -> Path:
    """Return where the manifest of a directory is or goes; one of former days stays what it is called until it goes."""
    path, former = directory / _manifest_name(directory), directory / MANIFEST_NAME
    return former if former.is_file() and not path.is_file() else path


def _take_away_for_good(path: Path) -> None:
    """Remove a file so that no power cut brings it back after what it vouches for has been replaced."""
    if path.is_symlink() or path.exists():
        take_away(path)
        fsync_directory(path.parent)


def _field(fields: Mapping[str, Any], name: str) -> Any:
    *tables, key = name.split(".")
    for table in tables:
        fields = fields.get(table, {})
    return fields.get(key, _NOTHING)


def _written_out(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` with those of `defaults` that it leaves out."""
    whole = copy.deepcopy(dict(fields))
    for name, value in defaults.items():
        *tables, key = name.split(".")
        place = whole
        for table in tables:
            place = place.setdefault(table, {})
        place.setdefault(key, value)
    return whole


def read_manifest(directory: Path) -> Manifest:
    """Read a directory's manifest.

    Raises:
        MissingFileError: what writes there has not finished.
        UserError: the manifest is damaged, or of another schema version; names it.
    """
    path = manifest_path(directory)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: what writes {directory} has not finished")
    return parse_manifest(path.read_bytes(), where=str(path))


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Return the manifest in the JSON text `data` of the file or URL `where`; raises as `read_manifest` does."""
    mend = f"remove it and type the command that makes {where.rpartition('/')[0]} again: that writes it anew"
    content = parse_state(data, where=where, mend=mend, keys=("schema",))
    require_same("schema", SCHEMA_VERSION, content.pop("schema"), where=where, mend=mend)
    return state_of(Manifest, content, where=where, mend=mend)


def _mend_marker(name: str) -> str:
    return f"remove it and type the command again: {name} alone is done anew"


def require_same(field_name: str, expected: Any, found: Any, *, where: str, mend: str) -> None:
    """Refuse what was made with another setting, naming the field and both values; `mend` says what to do about it."""
    if expected != found:
        raise UserError(f"{where}: {field_name} is {found!r}, but {expected!r} is needed; {mend}")


def require_same_fingerprint(expected: Fingerprint, found: Fingerprint, *, where: str, mend: str) -> None:
    """Refuse a fingerprint that differs, naming the first field that does, as `require_same` does."""
    for name in sorted(expected.fields.keys() | found.fields.keys()):
        require_same(name, expected.fields.get(name), found.fields.get(name), where=where, mend=mend)

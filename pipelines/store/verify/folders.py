"""The folders of a run, each with its kind, its manifest and the files that it owns."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from errors import UserError
from pipelines.as_typed import typed_flag
from pipelines.store.manifest import MARKER_FOLDER, Manifest, ShardReport, manifest_path, read_manifest
from pipelines.store.state_files import read_state, state_damage
from pipelines.store.verify.findings import SEE_TO_IT, Problem, unreadable
from pipelines.store.verify.kinds import KINDS, RUN, Door, FolderKind, match_place

MARKER_KEYS = ("fingerprint", "report")


@dataclass
class Folder:
    """A folder of a kind.

    Attributes:
        path: of it; name: the same below the run.
        run: that it is in.
        groups: of its place, by name.
        files: by their paths below it; those of folders of a kind within it are theirs.
        manifest: None where there is none, or a damaged one, which `faults` tell of.
        faults: what is wrong with the manifest, and the folders below that cannot be listed.
        reports: of its shards, by the manifest or, without one, by the markers.
    """

    path: Path
    name: str
    kind: FolderKind
    run: Path
    groups: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    manifest: Manifest | None = None
    faults: list[Problem] = field(default_factory=list)
    reports: dict[str, ShardReport] = field(default_factory=dict)

    @property
    def manifest_name(self) -> str:
        """What its manifest is called."""
        return manifest_path(self.path).name

    def problem(self, text: str, *, shard: str | None = None, key: str | None = None, mend: str = "") -> Problem:
        """Return a problem of this folder."""
        return Problem(directory=self.path, shard=shard, key=key, text=text, mend=mend)

    @property
    def command(self) -> str:
        """What makes what is in it and goes on with it, as it is typed."""
        return self.kind.door.command(self.run, self.groups)

    def mend(self, template: str, path: Path, *, made_by: Door | None = None) -> str:
        """Return what to do about a file, from a `FileKind.mend`."""
        quoted = {"path": shlex.quote(str(path)), "folder": shlex.quote(str(self.path))}
        flags = {name: typed_flag(name) for name in ("recipe", "shards")}
        command = self.command if made_by is None else made_by.command(self.run, self.groups)
        return template.format(**quoted, **flags, command=command)

    def markers(self) -> dict[str, Path]:
        """Return the markers by the names of their shards."""
        prefix = f"{MARKER_FOLDER}/"
        names = [name for name in self.files if name.startswith(prefix) and name.endswith(".json")]
        found = {name: name.removeprefix(prefix).removesuffix(".json") for name in names}
        return {shard: self.files[name] for name, shard in found.items() if not _file_name(name).startswith(".")}


def find_folders(run: Path) -> list[Folder]:
    """Return every folder of a run that a room writes, in order of their paths; the run itself is the first."""
    failed: list[OSError] = []
    files = dict(_walk(run, failed))
    folders: dict[str, Folder] = {}
    candidates: dict[str, list[tuple[FolderKind, dict[str, str]]]] = {}
    for name in files:
        for place in _ancestors(name):
            if place in folders:
                continue
            if place not in candidates:
                matches = [(kind, match_place(kind, place)) for kind in KINDS]
                candidates[place] = [(kind, groups) for kind, groups in matches if groups is not None]
            for kind, groups in candidates[place]:
                if any(fnmatchcase(_below(place, name), sign) for sign in kind.signs):
                    folders[place] = Folder(path=run / place, name=place, kind=kind, run=run, groups=groups)
                    break
    for name, path in files.items():
        owner = next(folders[place] for place in _ancestors(name) if place in folders)
        owner.files[_below(owner.name, name)] = path
    for error in failed:
        name = Path(error.filename).relative_to(run).as_posix()
        place = next((place for place in (name, *_ancestors(name)) if place in folders), ".")
        owner = folders.setdefault(place, Folder(path=run, name=".", kind=RUN, run=run))
        owner.faults.append(owner.problem(unreadable(_below(place, name), error), mend=SEE_TO_IT))
    ordered = [folders[place] for place in sorted(folders, key=lambda place: PurePosixPath(place).parts)]
    for folder in ordered:
        _open(folder)
    return ordered


def _walk(run: Path, failed: list[OSError]) -> Iterator[tuple[str, Path]]:
    """Yield every file by its path below the run; what links lead to is seen once.

    What keeps a folder from being listed is added to `failed`, unless a command has just removed it.
    """
    seen: set[Path] = set()

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            failed.append(error)

    for directory, folders, names in os.walk(run, onerror=fail, followlinks=True):
        real = Path(directory).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        place = Path(directory)
        for name in sorted(names):
            yield (place / name).relative_to(run).as_posix(), place / name


def _ancestors(name: str) -> list[str]:
    """Return the folders that a file is in, the deepest first."""
    return [parent.as_posix() for parent in PurePosixPath(name).parents]


def _below(place: str, name: str) -> str:
    return name if place == "." else name.removeprefix(f"{place}/")


def _file_name(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _open(folder: Folder) -> None:
    """Read what a folder says of itself."""
    if folder.manifest_name in folder.files and folder.kind.has_manifest:
        mend = folder.mend("`rm {path}`, then `{command}`: it is summed up anew", folder.files[folder.manifest_name])
        try:
            fault = _open_manifest(folder)
        except OSError as error:
            fault, mend = unreadable(folder.manifest_name, error), SEE_TO_IT
        if fault is None:
            return
        folder.faults.append(folder.problem(fault, mend=mend))
    if folder.kind.has_shards:
        for shard, path in folder.markers().items():
            # One that cannot be used is named by the check of the markers.
            with contextlib.suppress(UserError, OSError, TypeError, AssertionError, AttributeError):
                folder.reports[shard] = ShardReport(**read_state(path, mend="", keys=MARKER_KEYS)["report"])


def _open_manifest(folder: Folder) -> str | None:
    """Read a folder's manifest; returns what is wrong with it."""
    if damage := state_damage(folder.files[folder.manifest_name], keys=("schema",)):
        return f"{folder.manifest_name} {damage}"
    try:
        folder.manifest = read_manifest(folder.path)
    except (UserError, LookupError, TypeError, AttributeError, AssertionError) as error:
        return f"{folder.manifest_name} cannot be used: {error}"
    folder.reports = folder.manifest.shards
    return None

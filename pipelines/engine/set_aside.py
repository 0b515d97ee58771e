"""Finished shards that only need completing: they are set aside, and a worker takes from them what stands.

Files go to `.earlier/` first, then a note of what they were made from, and only then is the shard's marker removed.
Killed at any moment, the next run goes on from there; the bytes are those of a run that never knew anything else.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.engine.pieces import Source, forget_pieces
from pipelines.engine.progress import get_logger
from pipelines.store.files import (
    atomic_file,
    atomic_write_json,
    discard,
    discard_folder,
    is_file_itself,
    own_files,
    remove_temporary_files,
)
from pipelines.store.manifest import Fingerprint, ShardDirectory
from pipelines.store.state_files import read_state, state_of

EARLIER_FOLDER = ".earlier"
NOTE_NAME = re.compile(r"[^.].*\.json", re.DOTALL)

log = get_logger("engine")


@dataclass(frozen=True, kw_only=True)
class EarlierNote:
    """What the files of a shard that is set aside were made from, and what its report said beyond the counts."""

    source: str
    fingerprint: str
    details: dict[str, Any] = field(default_factory=dict)


def read_note(folder: Path, name: str) -> EarlierNote | None:
    """Return the note of a shard that is set aside in a folder; None where none is.

    Raises:
        UserError: it is damaged; names it.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    mend = "its shard is made anew"
    return state_of(EarlierNote, read_state(path, mend=mend), where=str(path), mend=mend)


def earlier_files(output: ShardDirectory, suffix: str) -> list[Path]:
    """Return the files of one kind of all shards that are set aside."""
    return [path.with_suffix(suffix) for path in own_files(output.path / EARLIER_FOLDER, NOTE_NAME)]


def set_shard_aside(
    output: ShardDirectory, source: Source, fingerprint: Fingerprint, *, suffixes: Sequence[str]
) -> None:
    """Set a finished shard aside, to be completed by the run that follows; under the lock of `output`.

    `fingerprint` is what its files were made under.
    """
    folder = output.path / EARLIER_FOLDER
    folder.mkdir(exist_ok=True)
    details = output.any_report(source.name).details
    output.clear_manifest()
    for suffix in suffixes:
        with atomic_file(folder / f"{source.name}{suffix}") as temporary:
            temporary.unlink(missing_ok=True)
            _link(output.file(source.name, suffix), temporary)
    note = EarlierNote(source=source.identity, fingerprint=fingerprint.digest, details=details)
    atomic_write_json(folder / f"{source.name}.json", asdict(note))
    # A killed run has left parts behind its marker, perhaps: without it they would be joined again as they are.
    forget_pieces(source.name, output)
    output.clear_marker(source.name)


def clear_set_aside(
    output: ShardDirectory,
    sources: Sequence[Source],
    fingerprint: Fingerprint,
    *,
    suffixes: Sequence[str],
    made_under: Callable[[str], Fingerprint],
) -> None:
    """Forget what was set aside of shards that are done, and what the recipe or the sources have left behind.

    `made_under` gives what the files of a shard that is set aside were made under, if today's settings can use them;
    it may raise a UserError of a damaged file.
    """
    folder = output.path / EARLIER_FOLDER
    if not folder.is_dir():
        return
    remove_temporary_files(folder, is_held=True)
    for source in sources:
        note = folder / f"{source.name}.json"
        files = [folder / f"{source.name}{suffix}" for suffix in suffixes]
        if note.is_file():
            is_done = output.is_done(source.name, source.identity, fingerprint)
            if is_done or not _is_usable(folder, files, source, made_under):
                discard(note)
        # Without its note, a file is what a killed run has left.
        for file in files:
            if not note.is_file() and is_file_itself(file):
                discard(file)
    discard_folder(folder)


def _is_usable(folder: Path, files: Sequence[Path], source: Source, made_under: Callable[[str], Fingerprint]) -> bool:
    try:
        note = read_note(folder, source.name)
        known = made_under(source.name).digest
    except UserError as error:
        log.warning(str(error))
        return False
    is_whole = all(file.is_file() for file in files)
    return note is not None and is_whole and (note.source, note.fingerprint) == (source.identity, known)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        # Some shared storage has no hard links.
        shutil.copyfile(path, target)

"""A user's files among the house's own, of names that look like its own, and what a killed process leaves of them."""

from collections.abc import Callable, Collection
from pathlib import Path

NOISE = b"somebody's own, neither JSON nor Parquet nor an image"
KILLED = "0123abcd"  # what stands in the name of a temporary file
# Rewritten whenever a command ends, with its seconds; and locks.
CHANGING = ("summary.json", ".lock", ".summary.lock")


def scatter(place: Path) -> dict[Path, bytes]:
    """Put files of confusing names into a folder and every folder in it, hidden ones too; returns their bytes."""
    outside = place.parent / f"outside-{place.name}.txt"
    outside.write_bytes(NOISE)
    found = {outside: NOISE}

    def put(path: Path, data: bytes = NOISE) -> None:
        path.write_bytes(data)
        found[path] = data

    for folder in [place, *(path for path in sorted(place.rglob("*")) if path.is_dir())]:
        own = sorted(path for path in folder.iterdir() if path.is_file())
        for name in (".notes.tmp", f".notes.{KILLED}.tmp~", "notes.txt", ".notes.json", ".claim-notes"):
            put(folder / name)
        trap = folder / f".kept.txt.{KILLED}.tmp"
        trap.mkdir()
        put(trap / "inside.txt")
        link = folder / f".link.txt.{KILLED}.tmp"
        link.symlink_to(outside)
        found[link] = NOISE
        for path in own[:3]:
            data = path.read_bytes()
            put(path.with_name(f"{path.stem} (copy){path.suffix}"), data)
            put(path.with_name(f"{path.name}~"), data)
            put(path.with_name(f".#{path.name}"), data)
            put(path.with_name(f"{path.name}.bak"), data)
    return found


def plant(place: Path, *, besides: Collection[Path]) -> list[Path]:
    """Put beside every file of the house what a process leaves that is killed while it writes it anew."""
    own = [path for path in sorted(place.rglob("*")) if path.is_file() and path not in besides]
    own = [path for path in own if path.name not in CHANGING and not path.name.endswith(".tmp")]
    planted = [path.with_name(f".{path.name}.{KILLED}.tmp") for path in own]
    for path in planted:
        path.write_bytes(b"half of it")
    return planted


def require_kept(place: Path, command: Callable[[], object], *, redo: Callable[[], None]) -> None:
    """Type a command twice: where nothing is to do, and after `redo` has undone a part, with leftovers of kills around.

    `place` is the folder that it writes. What a user has put there stays byte for byte, the house's own files become
    what they were, and what was left half-written is gone.
    """
    own = {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}
    own = {path: data for path, data in own.items() if path.name not in CHANGING}
    users = scatter(place)
    command()
    assert {path: path.read_bytes() for path in users} == users
    planted = plant(place, besides=users)
    redo()
    command()
    assert {path: path.read_bytes() for path in users} == users
    changed = [str(path.relative_to(place)) for path, data in own.items() if path.read_bytes() != data]
    left = [str(path.relative_to(place)) for path in planted if path.exists()]
    assert not changed and not left, f"changed: {changed}, left: {left}"

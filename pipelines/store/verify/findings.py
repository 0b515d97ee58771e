"""What a check of a run found, as it is told: problems with what to do about each, unfinished work, notes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.store.manifest import Manifest

SEE_TO_IT = "see to its rights, or to the disk"


def unreadable(name: str, error: OSError) -> str:
    """Return what is wrong with a file or folder that the disk does not give."""
    return f"{name} cannot be read: {error.strerror or error}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong: `mend` says what to do about it, a command or a file to remove."""

    directory: Path
    shard: str | None = None
    key: str | None = None
    text: str
    mend: str = ""

    def __str__(self) -> str:
        names = [str(self.directory), self.shard and f"shard {self.shard}", self.key and f"key {self.key}"]
        return ": ".join([", ".join(name for name in names if name), self.text])


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """Work that has begun and not ended: no damage, and `command` goes on with it."""

    directory: Path
    text: str
    command: str

    def __str__(self) -> str:
        return f"{self.directory}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Check:
    """Some files of a folder that are read to their end; `look` returns what is wrong, a text is a note.

    Attributes:
        directory: the folder, which a file that cannot be read is told of, and `shard` if it is one's.
    """

    directory: Path
    shard: str | None = None
    files: tuple[Path, ...] = ()
    look: Callable[[], Problem | str | None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One directory in the table; samples are those of its manifest, or of its markers where it has none."""

    directory: Path
    num_files: int
    num_kept: int | None
    num_rejected: int | None


@dataclass
class Findings:
    """What a check of a run found.

    Attributes:
        problems: damage; one of them is status 1.
        unfinished: no damage.
        notes: worth knowing.
        checked: every file that was looked into.
        unchecked: files of ours that are by design not looked into.
        others: files that no room writes, which are the user's.
    """

    rows: list[Row] = field(default_factory=list)
    manifests: dict[Path, Manifest] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unfinished: list[Unfinished] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: set[Path] = field(default_factory=set)
    unchecked: set[Path] = field(default_factory=set)
    others: set[Path] = field(default_factory=set)
    num_bytes: int = 0
    seconds: float = 0.0

"""What is typed, as messages name it: a command and its flags in the words of the door that was taken, and slips.

Needs nothing but Python, as make's own check of its command line runs before there is an environment.
"""

import difflib
import os
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

# In the environment of a command and of all that it starts: `make` or `atelier`.
DOOR = "ATELIER_DOOR"
MAKEFILE = Path(__file__).resolve().parent.parent / "Makefile"
# Stands for a value that is the user's to choose.
ANY = "…"


def came_by_make() -> bool:
    """Whether the command was typed behind make; of one that came by no door, whether there is a make here."""
    door = os.environ.get(DOOR)
    return MAKEFILE.is_file() if door is None else door == "make"


def enter_by(*, make: bool) -> None:
    """Note which door was taken."""
    os.environ[DOOR] = "make" if make else "atelier"


def variable(flag: str) -> str:
    """Return the name of a flag's variable of make: FROM_SCRATCH of `from-scratch`."""
    return flag.upper().replace("-", "_")


def flag_of(name: str) -> str:
    """Return the flag whose variable of make has a name."""
    return name.lower().replace("_", "-")


def typed_flag(name: str, value: object = None) -> str:
    """Return a flag as it is typed: `STAGE=2` or `--stage 2`; without a value its name, and with True as a switch."""
    if value is None or (value is True and not came_by_make()):
        return variable(name) if came_by_make() else f"--{name}"
    text = "1" if value is True else str(value)
    text = text if ANY in text else shlex.quote(text)
    return f"{variable(name)}={text}" if came_by_make() else f"--{name} {text}"


def typed_settings(values: Mapping[str, object]) -> str:
    """Return settings of the recipe as they are typed: by make all in one SET, by atelier each for itself."""
    pairs = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    return " ".join(typed_flag("set", text) for text in ([" ".join(pairs)] if came_by_make() else pairs))


def typed_command(name: str, flags: Mapping[str, object] | None = None) -> str:
    """Return a command as it is typed: `make train STAGE=2 RUN=runs/x`, `atelier train --stage 2 --run runs/x`."""
    typed = [typed_flag(flag, value) for flag, value in (flags or {}).items()]
    return " ".join(["make" if came_by_make() else "atelier", name, *typed])


def did_you_mean(word: str, known: Collection[str], *, prefix: str = "", most: int = 1) -> str:
    """Return ` (did you mean …?)` with the known words that are nearest to one that is not known; else nothing.

    A word may be near a part of a known one: `stpes` means `num_steps`.
    """
    names = {part: name for name in reversed([*known]) for part in name.split("_")} | {name: name for name in known}
    near = dict.fromkeys(names[part] for part in difflib.get_close_matches(word, names, n=most))
    return f" (did you mean {' or '.join(prefix + name for name in near)}?)" if near else ""


def typed_path(path: str | Path) -> Path:
    """Return a path as it is typed, with `~` filled in; `~name` of no user is a name as any other."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)

"""A folder with the Makefile, in which a recorder stands for the environment's interpreter: what make asks of it."""

import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def make_house(folder: Path, record: str) -> Path:
    """Lay out the folder; `record`, lines of a shell, writes down what is asked. What looks at words is let run."""
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("atelier", "pipelines"):
        (folder / name).symlink_to(REPOSITORY / name)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$2" in atelier.typed) exec {sys.executable} "$@";; esac\n{record}')
    python.chmod(0o755)
    (folder / ".venv" / ".ready").touch()
    return folder

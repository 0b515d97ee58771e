"""`python -m captioning` in processes of its own, for the campaigns that disturb it."""

import subprocess
import sys
from pathlib import Path


def line(folder: Path, run: Path, *, alone: bool) -> list[str]:
    """The command that captions by `folder`'s recipe; `alone`: in one process, without Ray."""
    options = ["--set", f"engine.in_process={str(alone).lower()}"]
    return [sys.executable, "-m", "captioning", "--recipe", str(folder / "recipe.toml"), "--run", str(run), *options]


def finish(command: list[str]) -> None:
    """Run a command to its end, which is to be a good one."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What a newcomer types must exist: Make targets with their help, packages that install, pins that match the ranges."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from atelier.commands import SUBCOMMANDS

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
ROOMS = ("captioning", "dataset_stats", "features", "training", "sampling", "toyworld")


def test_every_make_target_is_in_help() -> None:
    shown = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    told = "include Makefile\n$(info $(filter-out $(BENCHMARKS),$(TARGETS)))\n"
    listed = subprocess.run(["make", "-f", "-"], input=told, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    targets = set(listed.stdout.splitlines()[0].split())
    assert targets == set(re.findall(r"^  make ([a-z-]+)", shown, re.MULTILINE))
    assert set(SUBCOMMANDS) <= targets
    quality = {"test", "test-faults", "check", "bench"}
    assert quality | {"demo", "caption", "stats", "features", "train", "sample"} <= targets


def test_ci_runs_the_checks_every_test_and_the_demo_twice_and_verifies_it() -> None:
    lines = [line.partition(" #")[0] for line in (REPOSITORY / ".ci" / "run").read_text().splitlines()]
    called = [line.split()[1] for line in lines if line.startswith("make ")]
    assert called == ["check", "test", "test-faults", "demo", "demo", "verify"]


FAKE_PYTHON = """#!/bin/sh
mkdir -p .venv/bin
printf '#!/bin/sh\\necho "WARNING: a script is not on PATH"\\nexit %s\\n' "$STATUS" > .venv/bin/pip
chmod +x .venv/bin/pip
"""


@pytest.mark.parametrize("status", [0, 1])
def test_the_first_make_says_one_line_and_keeps_the_noise_of_pip_for_a_failure(tmp_path, monkeypatch, status) -> None:
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("STATUS", str(status))
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the make that runs these tests
        monkeypatch.delenv(name, raising=False)
    command = ["make", ".venv/.ready", "PYTHON=./python"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    first, *others = made.stderr.splitlines()
    assert first.startswith("make: installing the packages") and first.endswith("a minute or two")
    assert bool(made.returncode) == bool(status) == ("WARNING: a script is not on PATH" in others), made.stderr
    assert (tmp_path / ".venv" / "pip.log").read_text() == "WARNING: a script is not on PATH\n"
    if status == 0:
        assert made.stdout + "".join(others) == ""
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert again.stderr == "" and "up to date" in again.stdout


def test_the_wheel_holds_every_module_and_the_toy_weights(tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("pixart_atelier-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    rooms = (*ROOMS, "pipelines", "encoders", "pixart")
    expected = {name for name in tracked.splitlines() if name.split("/")[0] in rooms and "/" in name}
    assert (expected | {"errors.py"}) - names == set()


def test_pins_satisfy_the_ranges() -> None:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    assert pins["torch"] == "2.13.0"
    assert not {"torchvision", "torchaudio"} & pins.keys()
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        assert requirement.name in pins, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[requirement.name]), (
            f"{requirement} does not admit {pins[requirement.name]}"
        )


@pytest.mark.parametrize("room", ROOMS)
def test_help_needs_neither_torch_nor_ray(room: str) -> None:
    """Captions, statistics and sampling install without DeepSpeed; help comes at once, whatever is installed."""
    blocked = ("torch", "ray", "deepspeed", "transformers", "diffusers", "nltk", "numba")
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); "
    script = f"{block}import runpy; sys.argv = ['{room}', '--help']; runpy.run_module('{room}', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m " + room in result.stdout


def test_a_missing_recipe_is_one_line() -> None:
    command = [sys.executable, "-m", "captioning", "--recipe", "recipes/no.toml", "--run", "runs/x"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == "captioning: recipe recipes/no.toml does not exist"

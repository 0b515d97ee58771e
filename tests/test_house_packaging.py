"""What a newcomer types must exist: Make targets with their help, packages that install, pins that match the ranges."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from atelier.commands import SUBCOMMANDS
from errors import DISTRIBUTION, PACKAGE_OF_MODULE
from tests.raw_shards import encode, photo, write_tar
from tests.test_house_floors import imported_modules

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
ROOMS = ("captioning", "curation", "dataset_stats", "features", "training", "sampling", "toyworld")


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
ln -sf /bin/true .venv/bin/python
"""


@pytest.mark.parametrize("status", [0, 1])
def test_the_first_make_says_one_line_and_keeps_the_noise_of_pip_for_a_failure(tmp_path, monkeypatch, status) -> None:
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("STATUS", str(status))
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of what git knows, built elsewhere: here setuptools would add what an earlier build has left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(REPOSITORY / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "dist"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("pixart_atelier-*.whl")
    return wheel


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (REPOSITORY / name).is_file()]


def test_the_wheel_holds_every_module_the_toy_weights_and_the_recipes(wheel) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    rooms = (*ROOMS, "atelier", "pipelines", "encoders", "pixart")
    expected = {name for name in tracked() if name.split("/")[0] in rooms and "/" in name}
    recipes = {name.replace("recipes/", "atelier/shipped/", 1) for name in tracked() if name.startswith("recipes/")}
    assert names == expected | recipes | {"errors.py"}


def alone() -> dict[str, str]:
    """The environment without the clone on Python's path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The console command of an environment that has the wheel, and the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Behind its own, so that the clone is not taken for what is installed.
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-deps", "-q"]
    # Not from here, where pip may see the metadata of an earlier build.
    subprocess.run([*pip, str(wheel)], cwd=folder, env=alone(), check=True, capture_output=True)
    return folder / "bin" / "atelier"


OF_PYTHON = ("json", "typing", "queue", "logging", "select")
HOSTILE = ("sampling", "errors", "torch", "captioning", "features", "pipelines", "atelier", "numpy", "rich", *OF_PYTHON)
# A process that a command starts, which Python would let look into the working folder first.
CHILD = """
import subprocess, sys
from atelier.safe_path import keep_safe_path
keep_safe_path()
subprocess.run([sys.executable, "-m", "features", "--help"], check=True)
"""


@pytest.fixture
def users_folder(tmp_path) -> Path:
    """A folder of somebody whose files have the names of modules."""
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'taken from {__file__}')\n")
    return tmp_path


def test_the_command_runs_from_any_folder_with_a_recipe_that_is_shipped(installed, users_folder) -> None:
    write_tar(users_folder / "a b" / "0.tar", [("0.jpg", encode(photo(0)))])
    typed = ["--recipe", "recipes/toyworld.toml", "--run", "my run", "--shards", "a b/0.tar", "--plan"]
    typed += ["--set", 'captioning.shards=["*"]']
    done = subprocess.run([installed, "caption", *typed], cwd=users_folder, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Captions of 1 shards into my run/captions" in done.stderr


def test_what_a_command_starts_takes_nothing_in_the_users_folder_for_a_module(installed, users_folder) -> None:
    python = [installed.parent / "python", "-P", "-c", CHILD]
    done = subprocess.run(python, cwd=users_folder, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_an_empty_entry_of_pythonpath_is_not_the_users_folder(installed, users_folder) -> None:
    """As `export PYTHONPATH=$PYTHONPATH:/x` has one."""
    for name in ("atelier", *OF_PYTHON):  # which are read before anything of ours could help
        (users_folder / f"{name}.py").unlink()
    environment = alone() | {"PYTHONPATH": f"{os.pathsep}/x"}
    line = [installed, "caption", "--recipe", "x.toml"]
    done = subprocess.run(line, cwd=users_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "recipe x.toml does not exist" in done.stderr


def test_make_finds_the_house_from_any_folder_whatever_python_is_told(users_folder) -> None:
    line = ["make", "-C", str(REPOSITORY), "--no-print-directory", "-o", ".venv/.ready", "caption", "RECIPE=x.toml"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(line, cwd=users_folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "recipe x.toml does not exist; the shipped ones are" in done.stderr


HIDDEN = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))
del sys.argv[1]
from atelier.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("hidden", "typed", "install"),
    [
        ("torch", ["convert", "--from", "a", "--to", "b"], f"pip install '{DISTRIBUTION}[training]'"),
        (
            "nltk",
            ["stats", "--recipe", "toyworld", "--run", "x", "--sets", "web=t.csv#TEXT"],
            f"pip install '{DISTRIBUTION}[stats]'",
        ),
        (
            "deepspeed",
            ["train", "--recipe", "toyworld", "--run", "x", "--stage", "2", "--plan"],
            f"pip install '{DISTRIBUTION}[training]'",
        ),
        ("rich", ["caption"], f"pip install {DISTRIBUTION}"),
        ("PIL", ["caption", "--recipe", "toyworld"], f"pip install {DISTRIBUTION}"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(installed, tmp_path, hidden, typed, install) -> None:
    (tmp_path / "t.csv").write_text("TEXT\nA dog.\n")
    python = [installed.parent / "python", "-P", "-c", HIDDEN, hidden, *typed]
    done = subprocess.run(python, cwd=tmp_path, env=alone(), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = " ".join(done.stderr.split())
    assert f"the package {hidden} is not installed" in said.replace("pillow", "PIL") and said.endswith(install)


# What other packages that we name bring along, by module.
BROUGHT = {"pydantic_core": "pydantic", "markupsafe": "jinja2", "triton": "torch", "tokenizers": "transformers"}
EXTRAS = {"dataset_stats": "stats", "sampling": "sampling app", "training": "training wandb"}


@pytest.mark.parametrize("room", ROOMS)
def test_the_extra_of_a_room_brings_every_package_that_it_imports(room) -> None:
    """Else the extra that a message names would not help."""
    extras = PROJECT["project"]["optional-dependencies"]
    named = [text for extra in EXTRAS.get(room, room).split() for text in extras[extra]]
    brought = {Requirement(text).name for text in (*PROJECT["project"]["dependencies"], *named)}
    files = [REPOSITORY / name for name in tracked() if name.startswith(f"{room}/") and name.endswith(".py")]
    modules = {module.partition(".")[0] for file in files for module in imported_modules(ast.parse(file.read_text()))}
    others = modules - sys.stdlib_module_names - {*ROOMS, "pipelines", "encoders", "pixart", "errors"}
    packages = {PACKAGE_OF_MODULE.get(module, module).replace("_", "-") for module in others}
    missing = {name for name in packages if not {name, BROUGHT.get(name.replace("-", "_"))} & brought}
    assert missing == set()


# It brings torchvision, and pins torch.
NOT_LOCKED = "vllm"


def test_pins_satisfy_the_ranges() -> None:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    assert pins["torch"] == "2.13.0"
    assert not {"torchvision", "torchaudio"} & pins.keys()
    extras = PROJECT["project"]["optional-dependencies"]
    groups = [PROJECT["project"]["dependencies"], *(texts for extra, texts in extras.items() if extra != NOT_LOCKED)]
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
    said = "captioning: recipe recipes/no.toml does not exist; the shipped ones are "
    assert result.stderr.startswith(said) and result.stderr.count("\n") == 1

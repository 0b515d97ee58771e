"""What is typed behind a make target is what its command gets, and nothing that the shell exports."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.command import parse_command

REPOSITORY = Path(__file__).resolve().parent.parent
# Stands in for the interpreter of .venv, and writes down what it is asked to run.
RECORDER = """#!/bin/sh
mkdir busy || echo "two at once" >> all
printf '%s\\0' "$@" > asked
env > environment
echo "$*" >> all
rmdir busy
"""
TEXTS = [
    "a sign that says $5 off",
    "it costs $(HOME), $$ and ${PATH}",
    "an open $(",
    '"hello"',
    '"a red circle" # at night',
    "1984",
    "true",
    "it's \\ `echo no` && *",
    "two\nlines",
    "[INST] {a}, b; c | d > e",
]
# Target and option of each variable, with what stands before its value.
VARIABLES = {
    "RECIPE": ("caption", "--recipe", ""),
    "RUN": ("caption", "--run", ""),
    "SET": ("caption", "--settings", ""),
    "SHARDS": ("caption", "--text", "data.shards="),
    "SETS": ("stats", "--text", "dataset_stats.sets="),
    "SAMPLE": ("stats", "--set", "dataset_stats.sample="),
    "STAGE": ("train", "--stage", ""),
    "PHASE": ("train", "--phase", ""),
    "GPUS": ("train", "--set", "training.num_processes="),
    "HOSTFILE": ("train", "--text", "training.hostfile="),
    "REMOTE_SHELL": ("train", "--text", "training.remote_shell="),
    "PROMPT": ("sample", "--text", "sampling.prompt="),
    "PROMPTS": ("sample", "--text", "sampling.prompts="),
    "N": ("sample", "--set", "sampling.images_per_prompt="),
    "STEPS": ("sample", "--set", "sampling.num_steps="),
    "CFG": ("sample", "--set", "sampling.guidance_scale="),
    "SEED": ("sample", "--set", "sampling.seed="),
    "SIZE": ("sample", "--text", "sampling.size="),
    "TASK": ("eval", "sampling.evaluation", ""),
    "REFERENCE": ("eval", "--text", "evaluation.reference="),
    "CLIP": ("eval", "--text", "evaluation.clip="),
    "INCEPTION": ("eval", "--text", "evaluation.inception="),
    "PORT": ("app", "--set", "app.port="),
    "FROM": ("convert", "training.convert", ""),
    "PARTS": ("bench-gpu", "benchmarks.gpu", ""),
}
SWITCHES = {
    "PLAN": ("caption", ["--plan"]),
    "RETRY": ("caption", ["--set", "captioning.retry_rejects=true"]),
    "FROM_SCRATCH": ("train", ["--set", "training.{stage}.starts_from=scratch"]),
    "REPARAMETERIZE": ("convert", ["--reparameterize"]),
    "TINY": ("bench-gpu", ["--tiny"]),
}
NEEDED = {
    "train": ["STAGE=2"],
    "sample": ["STAGE=2"],
    "eval": ["STAGE=2"],
    "app": ["STAGE=2"],
    "convert": ["FROM=a", "TO=b"],
}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with the Makefile, and in the place of the environment's interpreter one that records."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(REPOSITORY / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    (folder / ".venv" / ".ready").touch()
    return folder


def run_make(house: Path, *typed: str, exported: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of the make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in outer} | (exported or {})
    command = ["make", "--no-print-directory", *typed]
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False)


def asked(house: Path, *typed: str, exported: dict[str, str] | None = None) -> list[str]:
    """What the command of a target is asked to do."""
    done = run_make(house, *typed, exported=exported)
    assert done.returncode == 0, done.stderr
    return (house / "asked").read_text().split("\0")[:-1]


def needed(target: str, name: str) -> list[str]:
    return [pair for pair in NEEDED.get(target, []) if not pair.startswith(f"{name}=")]


def test_every_variable_of_the_makefile_is_tried_here() -> None:
    (listed,) = re.findall(r"^TYPED := (.*?[^\\])$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    assert set(listed.replace("\\", "").split()) == {*VARIABLES, *SWITCHES, "TO"}


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_arrives_as_it_was_typed(house, text) -> None:
    words = asked(house, "sample", "STAGE=2", f"PROMPT={text}")
    assert words[words.index("--text") + 1] == f"sampling.prompt={text}"


@pytest.mark.parametrize("target", sorted({target for target, _, _ in VARIABLES.values()}))
def test_every_variable_arrives_as_it_was_typed(house, target) -> None:
    typed = {
        name: (option, f"{front}{name} it's \"5\" $5 $(HOME) # 'x'  y")
        for name, (of, option, front) in VARIABLES.items()
        if of == target
    }
    values = [f"{name}={word.removeprefix(VARIABLES[name][2])}" for name, (_, word) in typed.items()]
    words = asked(house, target, *values, *(pair for pair in NEEDED.get(target, []) if pair.split("=")[0] not in typed))
    assert set(typed.values()) <= set(itertools.pairwise(words))


def test_verify_and_convert_get_paths_with_spaces(house) -> None:
    assert asked(house, "verify", "RUN=runs/my run $1")[-2:] == ["--run", "runs/my run $1"]
    assert asked(house, "convert", "FROM=a b", "TO=c $d")[-2:] == ["a b", "c $d"]


@pytest.mark.parametrize("target", sorted({target for target, *_ in (VARIABLES | SWITCHES).values()}))
def test_what_the_shell_exports_is_not_taken(house, target) -> None:
    exported = dict.fromkeys([*VARIABLES, *SWITCHES, "TO"], "%n@%m")
    expected = asked(house, target, *NEEDED.get(target, []))
    assert asked(house, target, *NEEDED.get(target, []), exported=exported) == expected
    # But programs that ours start, such as a remote shell, read it where it is theirs.
    kept = dict(line.split("=", 1) for line in (house / "environment").read_text().splitlines() if "=" in line)
    typed = {pair.split("=")[0] for pair in NEEDED.get(target, [])} | {"RECIPE", "RUN"}
    assert {name for name in exported if kept.get(name) != "%n@%m"} == typed
    if target in NEEDED:
        done = run_make(house, target, exported=exported)
        assert done.returncode == 2 and "make: say which" in done.stderr


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_value_is_refused(house, name) -> None:
    target = VARIABLES[name][0]
    done = run_make(house, target, *needed(target, name), f"{name}= ")
    if name == "SET":  # of nothing
        assert done.returncode == 0
        return
    assert done.returncode == 2 and f"{name} is empty: type a value, or leave {name}= out" in done.stderr


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_on_unless_empty_or_zero(house, name) -> None:
    target, words = SWITCHES[name]
    typed = [target, *needed(target, name)]
    off = asked(house, *typed)
    assert asked(house, *typed, f"{name}=0") == asked(house, *typed, f"{name}=") == off
    on = asked(house, *typed, f"{name}=1")
    assert len(on) == len(off) + len(words) and on[on.index(words[-1]) + 1 - len(words) :][: len(words)] == words


def test_a_make_inside_a_make_passes_settings_on(house) -> None:
    """As `make demo` does, with what is typed behind it."""
    (house / "outer.mk").write_text("outer:\n\t@$(MAKE) -f Makefile RUN=x caption\n")
    words = asked(house, "-f", "outer.mk", "outer", "SET=sampling.prompt=it's $5 off", "RUN=y")
    assert words[-2:] == ["--settings", "sampling.prompt=it's $5 off"] and words[words.index("--run") + 1] == "x"


def steps_of(house: Path, *typed: str, exported: dict[str, str] | None = None) -> list[str]:
    """All that a target's steps are asked to do, in their order."""
    (house / "all").unlink(missing_ok=True)
    done = run_make(house, *typed, exported=exported)
    assert done.returncode == 0, done.stderr
    return (house / "all").read_text().splitlines()


def test_the_demo_takes_its_steps_one_by_one_whatever_jobs_are_typed(house) -> None:
    steps = steps_of(house, "demo")
    assert len(steps) == 16 and [step.split()[:3] for step in steps[:2]] == [
        ["-m", "toyworld", "world"],
        ["-m", "captioning", "--recipe"],
    ]
    assert steps_of(house, "-j4", "demo") == steps


@pytest.mark.parametrize("target", ["demo", "demo-raw"])
@pytest.mark.parametrize("typed", ["RUN=runs/x", "RECIPE=r.toml", "STAGE=2"])
def test_the_demo_refuses_what_it_would_ignore(house, target, typed) -> None:
    (house / "all").unlink(missing_ok=True)
    done = run_make(house, target, typed)
    name = typed.partition("=")[0]
    assert done.returncode == 2 and f"stages of its own: leave {name}= out" in done.stderr
    assert not (house / "all").exists()


def test_the_raw_half_of_the_demo_keeps_typed_settings_beside_its_own(house) -> None:
    own = 'features.stage2.captions=[{column="alt_text"}] features.stage2.shards=["laion_*"]'
    said = "sampling.prompt=it's $5 off"
    plain, changed = (
        [step for step in steps_of(house, "demo-raw", *typed, exported={"SET": "not=typed"}) if "runs/demo-raw" in step]
        for typed in ([], [f"SET={said}"])
    )
    assert len(plain) == 5 and all(f"--settings {own}" in step and "typed" not in step for step in plain)
    assert changed == [step.replace(own, f"{own} {said}") for step in plain]


def test_texts_stay_texts_in_the_recipe(tmp_path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("")
    for text in TEXTS:
        argv = ["--recipe", str(recipe), "--run", "x", "--set", "sampling.prompt=other", "--text"]
        assert parse_command("sampling", "", argv=[*argv, f"sampling.prompt={text}"]).recipe.tables == {
            "sampling": {"prompt": text}
        }

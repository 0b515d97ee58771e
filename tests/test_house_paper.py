"""`make paper`: the steps of each part and seed, and that what the page looks for is what they draw."""

import os
import subprocess
from pathlib import Path

import pytest
from house_of_make import make_house
from planted_paper import plant_world

from pipelines.recipe import load_recipe
from toyworld.paper import readings
from toyworld.paper.page import write_page

REPOSITORY = Path(__file__).resolve().parent.parent
RECORD = """\
echo "$3|$RECIPE|$RUN|$STAGE|$TASK|$SET" >> steps
"""
PARTS = ("start", "adaln", "captions", "tokens", "scales", "samplers", "guidance", "preference")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    return make_house(tmp_path_factory.mktemp("house"), RECORD)


def make(house: Path, *typed: str) -> subprocess.CompletedProcess[str]:
    (house / "steps").unlink(missing_ok=True)
    command = ["make", "--no-print-directory", "paper", *typed]
    return subprocess.run(command, cwd=house, env=os.environ, capture_output=True, text=True, check=False)


def steps_of(house: Path, *typed: str) -> list[list[str]]:
    """Door, recipe, run, stage, task and settings of each step."""
    done = make(house, *typed)
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in (house / "steps").read_text().splitlines()]


def test_a_part_alone_is_the_world_its_main_arm_and_the_part_for_each_seed(house) -> None:
    steps = steps_of(house, "PART=adaln", "SEEDS=2", "SET=sampling.num_steps=5")
    doors = [door for door, *_ in steps]
    arm = ["features", "train", "sample", "judge", "eval"]
    seed = [*arm, "sample", *arm, "judge", "paper-page"]
    assert doors == ["world", "caption", "stats", "judge", *seed, *seed]
    runs = list(dict.fromkeys(run for _, _, run, *_ in steps))
    assert runs == ["runs/paper/world", "runs/paper/seed-0", "runs/paper", "runs/paper/seed-1"]
    trained = [(run, stage, settings.split()) for door, _, run, stage, _, settings in steps if door == "train"]
    assert trained == [
        (f"runs/paper/seed-{number}", stage, [f"training.seed={number}", "sampling.num_steps=5"])
        for number in (0, 1)
        for stage in ("main", "per-block")
    ]
    assert {(house / "runs/paper/seed-1" / name).readlink() for name in ("raw", "captions", "features")} == {
        Path(f"../world/{name}") for name in ("raw", "captions", "features")
    }


def test_a_part_that_is_not_there_and_a_number_that_is_none_are_refused(house) -> None:
    refused = make(house, "PART=adalm")
    assert refused.returncode and f"has no part adalm: its parts are {' '.join(PARTS)}" in refused.stderr
    refused = make(house, "SEEDS=many")
    assert refused.returncode and "SEEDS is a number from 1 to 10" in refused.stderr
    assert not (house / "steps").exists()


def test_every_recipe_has_the_stages_that_its_steps_train_and_seeds_are_of_trainings_alone(house) -> None:
    steps = steps_of(house)
    for door, recipe, _, stage, _, settings in steps:
        if door in ("features", "train"):
            tables = load_recipe(REPOSITORY / recipe).tables
            assert stage in tables["training"], (recipe, stage)
            assert settings == "training.seed=0"
    recipes = {Path(recipe).name for _, recipe, *_ in steps}
    assert recipes == {path.name for path in (REPOSITORY / "recipes/paper").glob("*.toml")}


def test_the_page_looks_for_nothing_that_no_step_draws(house, tmp_path, monkeypatch) -> None:
    """A name that differs would be told as a part that has not run, in silence."""
    drawn = {stage for door, _, _, stage, *_ in steps_of(house) if door == "sample"}
    trained = {stage for door, _, _, stage, *_ in steps_of(house) if door == "train"}
    asked: dict[str, set[str]] = {"samples": set(), "stages": set()}

    def spy(kind: str, original):
        def read(run: Path, name: str):
            asked[kind].add(name)
            return original(run, name)

        return read

    monkeypatch.setattr(readings, "read_hits", spy("samples", readings.read_hits))
    monkeypatch.setattr(readings, "read_training", spy("stages", readings.read_training))
    plant_world(tmp_path, nouns={"LAION": (0.04, 2.5), "LAION-LLaVA": (1.0, 9.3)})
    (tmp_path / "seed-0").mkdir()
    write_page(tmp_path)
    assert asked["samples"] and asked["samples"] <= drawn, asked["samples"] - drawn
    assert asked["stages"] and asked["stages"] <= trained
    # And nothing is drawn that no claim is about, but for points of a curve that are shown when there are some.
    rest = drawn - asked["samples"] - {"main-400", "from-classes-500", "from-classes-900"}
    assert {name.rpartition("-")[0] for name in rest} <= {"scratch"}

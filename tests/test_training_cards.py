"""A plan for a card that is not here, as it is typed: what fits it, what would, and what is short."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from sampling_run import make_run as make_sampling_run
from sampling_run import write_recipe
from test_training_parts import random_network
from training_run import arguments, finish, make_run
from warm_python import WarmProcess

REPOSITORY = Path(__file__).resolve().parent.parent


def typed(*words: str) -> str:
    """What a target of make says."""
    line = ["make", "--no-print-directory", "-o", ".venv/.ready", *words]
    environment = os.environ | {"COLUMNS": "400", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features, and weights in diffusers' layout to start from."""
    run = make_run(tmp_path_factory.mktemp("cards"))
    random_network(run.parent / "start", 1)
    return run


def planned(run: Path, gigabytes: float, *, status: int = 0, **settings: object) -> str:
    asked = {"num_processes": 1, "dtype": "bf16", "starts_from": str(run.parent / "start")}
    flags = arguments(run, 2, device_gigabytes=gigabytes, **asked, **settings)
    return " ".join(finish(WarmProcess("training", [*flags, "--plan"]), status=status).split())


@pytest.mark.slow
def test_make_train_plans_for_a_card(run: Path) -> None:
    start = run.parent / "start"
    settings = f"training.device_gigabytes=12 training.dtype=bf16 training.stage2.starts_from={start}"
    words = ["train", "STAGE=2", "PLAN=1", "GPUS=1", f"RUN={run}", f"RECIPE={run.parent}/recipe.toml"]
    said = typed(*words, f"SET={settings}")
    assert "a rank of 11 GB that it may take: weights" in said
    assert "1 ranks x 1 micro-batches x 8, keeping 'all' activations; chosen to fit" in said
    assert not (run / "training" / "stage2" / "latest").exists()


@pytest.mark.slow
def test_a_plan_says_what_makes_a_stage_fit_and_then_plans_it(run: Path) -> None:
    lora = {"trains": "lora", "lora.rank": 2}
    for gigabytes, settings, switch in ((0.0002, lora, "average"), (0.0007, {}, "optimizer")):
        said = planned(run, gigabytes, status=2, **settings)
        lack, _, way = said.partition("; add ")
        room = f"{gigabytes * 0.92 * 1e6:.3g} kB"
        assert re.search(rf"even micro-batches of 1 .* need \d+ kB a rank of {room} that it may take: weights", lack)
        assert re.match(rf"SET=training.offload={switch}: \d+ kB in micro-batches of 8, keeping '\w+', which fits", way)
        said = planned(run, gigabytes, offload=switch, **settings)
        assert "micro-batches x 8, keeping" in said and f"a rank of {room} that it may take" in said
    # Nothing is enough.
    assert "; set training.offload to 'average' (a GPU's alone), or set training.optimizer" in planned(
        run, 1e-4, status=2
    )


@pytest.mark.slow
def test_make_sample_plans_for_a_card(tmp_path: Path) -> None:
    run = make_sampling_run(tmp_path)
    recipe = write_recipe(run, size="32x32")
    words = ["sample", "STAGE=2", "PLAN=1", f"RUN={run}", f"RECIPE={recipe}"]
    said = typed(*words, "SET=sampling.card_gigabytes=8")
    assert "a card of 8 GB has 7.2 GB for it, workspace and driver left out: it fits" in said
    # What is left beside the 0.8 GB that are not counted.
    said = typed(*words, "SET=sampling.card_gigabytes=0.8002")
    lack, _, way = said.partition("a card of 0.8 GB has 0.0002 GB for it, workspace and driver left out: ")
    assert lack and re.fullmatch(r"it does not fit; SET='sampling\..*' makes it 0\.0001\d+ GB, which fits", way)

"""Training, sampling, the app and evaluation open the same checkpoint of a stage, or say the same of it.

Where optimizer state alone is damaged, training refuses, and the others draw from the same checkpoint.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_checkpoint
from test_training_stage import job_of
from training_run import TEXT, VAE, arguments, make_run

from errors import MissingFileError, UserError
from pipelines.command import parse_command
from sampling.config import SamplingConfig
from sampling.evaluation.contestants import weights_kind
from sampling.opening import find_trained_model
from sampling.trained_model import open_run_model

STEPS = (4, 6, 12)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage 2 has three checkpoints, the newest in force, and copies a person has made."""
    run = make_run(tmp_path_factory.mktemp("whole"))
    job = job_of(run, 2, starts_from="scratch")
    trainer = {
        "stage": "stage2",
        "kind": "pixart",
        "resolution": 32,
        "buckets": ["32x32"],
        "text": TEXT,
        "vae": VAE | {"factor": 8},
        "starts_from": "scratch",
        "plan_fingerprint": job.fingerprint.digest,
        "fingerprint": job.fingerprint.fields,
    }
    for step in STEPS:
        folder = tiny_checkpoint.write_checkpoint(job.directory, step, trainer=trainer)
        (folder / "model" / "config.json").write_text(json.dumps({"patch_size": 2}))
    (job.directory / "latest").write_text("step-12\n")
    for copy in ("step-6.bak", "step-012", "step-99-best"):
        shutil.copytree(job.directory / "step-6", job.directory / copy)
    (job.directory / "step-100").write_text("a note")
    (job.directory / "step-101").symlink_to("step-6.bak")
    return run


def names(content: str) -> Callable[[Path], object]:
    return lambda stage: (stage / "latest").write_text(content)


def without_latest(stage: Path) -> None:
    (stage / "latest").unlink()


def lose_state(stage: Path) -> None:
    shutil.rmtree(stage / "step-12" / "deepspeed")


def empties(file: str) -> Callable[[Path], object]:
    return lambda stage: (stage / file).write_bytes(b"")


def all_of(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda stage: [change(stage) for change in changes]


WEIGHTS = "model/diffusion_pytorch_model.safetensors"
STATE = "deepspeed/mp_rank_00_model_states.pt"
NEWEST = ": the newest whole checkpoint is taken, step-"
# What is done to the folder, the checkpoint that is opened or what is said instead, and what is said beside it.
STATES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "as training left it": (lambda stage: None, "step-12", "None"),
    "latest set back": (names("step-6\n"), "step-6", "None"),
    "latest names a copy": (names("step-99-best"), "step-99-best", "None"),
    "latest gone": (without_latest, "step-12", f"latest is gone{NEWEST}12"),
    "latest empty": (names(""), "step-12", f"latest is empty{NEWEST}12"),
    "latest names nothing": (names("step-13"), "step-12", f"latest names 'step-13', which is not there{NEWEST}12"),
    "latest names a file": (names("step-100"), "step-12", f"latest names 'step-100', which is not there{NEWEST}12"),
    "latest leads elsewhere": (names("../stage1"), "step-12", f"'../stage1', which is not there{NEWEST}12"),
    "latest is no text": (lambda stage: (stage / "latest").write_bytes(b"\xff\0"), "step-12", NEWEST),
    "newest not whole": (
        all_of(without_latest, empties(f"step-12/{WEIGHTS}")),
        "step-6",
        f"latest is gone; step-12 is damaged ({WEIGHTS} is empty){NEWEST}6",
    ),
    "newest without trainer.json": (
        all_of(without_latest, lambda stage: (stage / "step-12" / "trainer.json").unlink()),
        "step-6",
        f"latest is gone; step-12 is damaged (trainer.json does not exist){NEWEST}6",
    ),
    "weights damaged": (empties(f"step-12/{WEIGHTS}"), "step-12 is damaged: model/", "echo step-6 > "),
    "state damaged": (empties(f"step-12/{STATE}"), "step-12 is damaged: deepspeed/", "echo step-6 > "),
    "state gone": (lose_state, "step-12 is damaged: deepspeed/ does not exist", "echo step-6 > "),
    "state and latest gone": (
        all_of(without_latest, lose_state),
        "step-6",
        f"latest is gone; step-12 is damaged (deepspeed/ does not exist){NEWEST}6",
    ),
    "trainer.json damaged": (empties("step-12/trainer.json"), "step-12 is damaged: trainer.json", "echo step-6 > "),
    "nothing": (shutil.rmtree, "", ""),
}
# What all others open, and the one warning, where training alone refuses: they need the weights.
DRAWN = {
    "state damaged": f"{STATE} is empty; its weights are whole and are taken, but training cannot go on from it",
    "state gone": "step-12 None",
}


def opened_by_training(run: Path) -> str | None:
    resume = job_of(run, 2, starts_from="scratch", num_steps=24).resume
    return resume and f"{resume.path} {resume.note}"


def opened_by_sampling(run: Path, caplog: pytest.LogCaptureFixture) -> str | None:
    """What `make sample`, `make app` and `make evaluate` open, and the one warning."""
    caplog.clear()
    command = parse_command("sampling", "", argv=arguments(run, 2), has_stages=True)
    try:
        model = find_trained_model(SamplingConfig(), command).model_path
    except MissingFileError as error:
        assert f"has no checkpoint: run `make train RUN={run} STAGE=stage2` first" in str(error)
        return None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) <= 1
    return f"{model.parent} {said[0] if said else None}"


def outcome(opens: Callable[[], str | None]) -> str | None:
    try:
        return opens()
    except MissingFileError:
        raise
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("state", STATES)
def test_training_and_sampling_open_the_same_checkpoint(
    whole: Path, tmp_path: Path, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, expected, said = STATES[state]
    run, stage = tmp_path / "run", tmp_path / "run" / "training" / "stage2"
    shutil.copytree(whole, run, symlinks=True)
    shutil.copy(whole.parent / "recipe.toml", tmp_path)
    change(stage)
    by_training = outcome(lambda: opened_by_training(run))
    by_sampling = outcome(lambda: opened_by_sampling(run, caplog))
    if state in DRAWN:
        assert by_sampling is not None and by_sampling.startswith(f"{stage}/step-12 ")
        assert by_sampling.endswith(DRAWN[state])
    else:
        assert by_sampling == by_training
    if state == "nothing":
        assert by_training is None
    else:
        assert by_training is not None and by_training.startswith(f"{stage / expected}") and said in by_training


def test_evaluation_compares_the_checkpoint_that_training_would_go_on_from(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    stage = tmp_path / "run" / "training" / "stage2"
    (stage / "latest").unlink()
    (stage / "step-12" / "trainer.json").write_bytes(b"{")
    opened = open_run_model(tmp_path / "run", "stage2")
    assert opened.model_path == stage / "step-6" / "model" and weights_kind(opened) == "ema"

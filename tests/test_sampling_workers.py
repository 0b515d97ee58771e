"""Sampling over Ray: the same bytes for any number of workers, and after the driver was killed."""

import multiprocessing
import signal
import time
from pathlib import Path

import pytest
from sampling_run import PROMPTS, make_run, write_recipe
from sound_run import require_sound

from errors import UserError
from pipelines.store.manifest import read_manifest
from sampling.__main__ import main

SETTINGS = {"images_per_prompt": 4, "max_images_in_process": 0, "num_threads": 1}
IN_PROCESS = {"max_images_in_process": 100}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """The files of the job drawn in this process."""
    run = make_run(tmp_path_factory.mktemp("in_process"))
    sample(run, **IN_PROCESS)
    return outputs(run)


def sample(run: Path, *options: str, **table: object) -> None:
    recipe = write_recipe(run, **(SETTINGS | table))
    main(["--recipe", str(recipe), "--run", str(run), "--stage", "3", *options])


def refuse(*_: object) -> None:
    raise UserError("Ray is started")


def outputs(run: Path) -> dict[str, bytes]:
    folder = run / "samples" / "stage3"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".parquet")}


@pytest.mark.slow
def test_two_workers_draw_the_same_bytes(tmp_path, expected):
    run = make_run(tmp_path)
    sample(run)
    assert len(expected) == 4 * len(PROMPTS) + 2
    assert outputs(run) == expected
    require_sound(run)
    assert read_manifest(run / "samples" / "stage3").num_kept == 4 * len(PROMPTS)


def test_a_killed_job_continues_to_the_same_bytes(tmp_path, expected):
    run = make_run(tmp_path)
    folder = run / "samples" / "stage3"
    process = multiprocessing.get_context("fork").Process(target=sample, args=(run,), kwargs=IN_PROCESS)
    process.start()
    while process.is_alive() and len(list(folder.glob("*.png"))) < 3:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    require_sound(run, unfinished=["samples/stage3"])
    # a batch of which one image was written before the kill
    next(folder.glob("*.png")).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.engine.run.choose_num_workers", refuse)
        with pytest.raises(UserError, match="Ray is started"):
            sample(run, **IN_PROCESS)  # it may have killed its command
    sample(run, "--set", "engine.in_process=true", **IN_PROCESS)
    assert outputs(run) == expected
    require_sound(run)
    assert not list(folder.glob(".*.tmp"))

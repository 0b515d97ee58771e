"""The latent worker by itself: how many threads decode, and that no byte depends on them."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from feature_run import write_run

from encoders.kl import KLCodec
from features.jobs import FeatureInputs, FeatureJob, read_inputs
from features.latent_worker import choose_batch_size, choose_decode_threads
from features.latents import latent_job
from pipelines.command import parse_command
from pipelines.engine.pieces import Piece
from pipelines.engine.run import EngineConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("latents"), num_shards=1)


def inputs_of(run: Path) -> FeatureInputs:
    arguments = ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", "2"]
    return read_inputs(parse_command("features", "", argv=arguments, has_stages=True))


def work(job: FeatureJob, folder: Path, **settings: object) -> dict[str, bytes]:
    """Return the files of the whole shard by suffix, by a worker with other settings than the job's."""
    folder.mkdir(exist_ok=True)
    piece = Piece(source=job.sources[0], start=0, stop=20, folder=folder, samples_per_slice=8)
    job.worker_class(replace(job.worker_config, **settings))(piece)
    return {suffix: piece.output(suffix).read_bytes() for suffix in job.worker_class.suffixes}


def test_no_byte_depends_on_the_threads_that_decode(run, tmp_path):
    job = latent_job(inputs_of(run))
    assert work(job, tmp_path / "1", decode_threads=1) == work(job, tmp_path / "7", decode_threads=7)


def test_a_gpu_takes_images_by_their_pixels_and_a_bound_of_the_recipe_goes_before(run, tmp_path, monkeypatch):
    assert [choose_batch_size("cuda", pixels) for pixels in (256, 512, 1024, 4096)] == [64, 16, 4, 1]
    assert choose_batch_size("cpu", 1024) == 32
    sizes, start = [], KLCodec.start
    monkeypatch.setattr(KLCodec, "start", lambda self, images: sizes.append(len(images)) or start(self, images))
    monkeypatch.setattr("features.latent_worker.CPU_BATCH_SIZE", 5)
    job = latent_job(inputs_of(run))
    for batch_size in (None, 7):
        work(job, tmp_path, batch_size=batch_size, preview_shard="")
    assert sizes == [5, 3, 5, 3, 4, 7, 1, 7, 1, 4]


def test_workers_of_a_machine_share_its_cores_and_none_has_more_than_16_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(96), raising=False)
    assert [choose_decode_threads(num_workers) for num_workers in (1, 8, 96, 200, None)] == [16, 12, 1, 1, 16]


def test_a_job_knows_how_many_workers_there_will_be_on_this_machine_and_not_of_a_cluster(run, monkeypatch):
    def count(engine: EngineConfig) -> int | None:
        return latent_job(replace(inputs_of(run), engine=engine)).worker_config.num_workers_here

    monkeypatch.setattr("features.speed._count_gpus", lambda: 8)
    # Without GPUs so little is done in the command's own process.
    assert count(EngineConfig()) == 1
    assert count(EngineConfig(gpus_per_worker=1.0)) == 8
    assert count(EngineConfig(in_process=False, num_workers=3)) == 3
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert count(EngineConfig(gpus_per_worker=1.0)) is None

"""Weights that predict the noise, continued as flow: how a stage begins, trains, goes on and is drawn, and what not."""

import json
from pathlib import Path

import pytest
import torch
from sampling_run import randomised
from training_run import D_TEXT, arguments, make_run, metrics, train

from errors import UserError
from pipelines.command import parse_command
from pixart.belonging import compare_base
from pixart.convert import load_diffusers, save_diffusers
from pixart.drawing.denoise import denoise, draw_noise, make_generators
from pixart.drawing.guidance import network_of_texts
from pixart.drawing.passes import Pass
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.scheduler_configs import spec_beside
from pixart.processes.specs import (
    ddpm_spec,
    flow_spec,
    lcm_student,
    noise_flow_spec,
    solvers_of,
    with_student_of,
)
from sampling.inputs import _process_identity
from sampling.trained_model import open_run_model
from training.data.stage_data import survey_stage
from training.stages.networks import network_config
from training.stages.stage import TrainingJob, open_stage
from training.stages.starts import starting_network

SHAPE = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "sample_size": 4, "caption_channels": D_TEXT}
NOISE = {"process": "flow", "flow_prediction": "noise"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("noise_flow"))


def open_job(run: Path, start: object, **settings: object) -> TrainingJob:
    argv = arguments(run, 2, starts_from=str(start), **settings)
    job = open_stage(parse_command("training", "", argv=argv, has_stages=True))
    job.directory.mkdir(parents=True, exist_ok=True)
    return job


def weights(folder: Path, process: dict | None = None, *, out_channels: int = 8) -> Path:
    """Write weights of random numbers, with a record of the process that they were trained with."""
    save_diffusers(randomised(PixArt(PixArtConfig(**SHAPE, out_channels=out_channels))), folder)
    if process is not None:
        (folder / "origins.json").write_text(json.dumps({"process": process}))
    return folder


def test_weights_of_ddpm_go_on_whole_and_the_setting_counts_for_flow_alone(run: Path, tmp_path: Path) -> None:
    start = weights(tmp_path / "start")
    job = open_job(run, start, **NOISE, flow_shift=3.0)
    assert job.settings.process_spec == noise_flow_spec(shift=3.0) and not job.begins_output_anew
    network, former = starting_network(job, network_config(job, survey_stage(job))), load_diffusers(start)
    assert all(torch.equal(value, former.state_dict()[name]) for name, value in network.state_dict().items())
    assert job.fingerprint.fields["training.flow_prediction"] == "noise"
    assert open_job(run, start, process="flow").begins_output_anew
    for others in ({"process": "flow"}, {"process": "ddpm", "flow_prediction": "noise"}):
        assert "training.flow_prediction" not in open_job(run, start, **others).fingerprint.fields
    assert open_job(run, weights(tmp_path / "flow", flow_spec(), out_channels=4), **NOISE).begins_output_anew


def test_weights_that_were_continued_go_on_as_flow_or_as_ddpm_where_that_is_typed(run: Path, tmp_path: Path) -> None:
    start = weights(tmp_path / "start", noise_flow_spec(shift=3.0))
    assert not open_job(run, start, **NOISE).begins_output_anew
    assert not open_job(run, start, process="ddpm").begins_output_anew
    said = (
        r"training\.stage2\.process is 'ddpm' where none is typed, but .* 'flow of networks that predict the noise': "
        r"type training\.stage2\.process = 'flow' and flow_prediction = 'noise' to go on with it, or 'ddpm' to train th"
    )
    with pytest.raises(UserError, match=said):
        open_job(run, start)
    said = r"flow_prediction is 'velocity' where none is typed.* = 'noise' to go on with it, or 'velocity' to begin the"
    with pytest.raises(UserError, match=said):
        open_job(run, start, process="flow")
    assert open_job(run, start, process="flow", flow_prediction="velocity").begins_output_anew


def test_weights_of_another_noise_schedule_are_refused_as_flow_and_said_as_ddpm(run: Path, tmp_path: Path) -> None:
    start = weights(tmp_path / "start", ddpm_spec({**ddpm_spec()["schedule"], "beta_end": 0.012}))
    with pytest.raises(
        UserError, match=r"start\) was trained with beta_end 0\.012 of its noise schedule, and .* 0\.02"
    ):
        open_job(run, start, **NOISE)
    (said,) = [line for line in open_job(run, start).departures if "schedule" in line]
    assert said.startswith("noise schedule: beta_end 0.012 -> 0.02; the weights were trained with the former")
    plain = open_job(run, weights(tmp_path / "plain"))
    assert not any("schedule" in line for line in plain.departures)


def test_adapters_go_beside_weights_of_ddpm_and_back(run: Path, tmp_path: Path) -> None:
    start = weights(tmp_path / "start")
    assert open_job(run, start, **NOISE, trains="lora").settings.keeps_base
    said = r"with process ddpm, and training\.stage2\.process is 'flow': flow_prediction = 'noise' goes on with them"
    with pytest.raises(UserError, match=said):
        open_job(run, start, process="flow", trains="lora")
    base = {"identity": "1", "location": "/w", "adapters": []}

    def added(trained: dict, to: dict) -> list[str]:
        known = {"base": base, "process": trained}
        return compare_base(Path("x"), known, title="w", location="/w", identity="1", adapters=(), process=to)

    assert added(noise_flow_spec(), ddpm_spec()) == added(ddpm_spec(), noise_flow_spec()) == []
    for others in ((noise_flow_spec(), flow_spec()), (flow_spec(), noise_flow_spec())):
        with pytest.raises(UserError, match=r"x was trained with process flow.*, but w with flow"):
            added(*others)


def test_students_are_those_of_ddpm(run: Path, tmp_path: Path) -> None:
    start = weights(tmp_path / "start", noise_flow_spec())
    teacher = {"objective": "consistency", "networks.teacher": str(start)}
    with pytest.raises(UserError, match=r"flow_prediction = 'noise' has no students: .* say process = 'ddpm'"):
        open_job(run, start, **NOISE, **teacher)
    with pytest.raises(UserError, match=r"'distribution_matching' needs process = 'ddpm', but .* is 'flow'"):
        open_job(run, start, **NOISE, **teacher | {"objective": "distribution_matching"})
    assert open_job(run, start, process="ddpm", **teacher).networks["teacher"].process == noise_flow_spec()
    student = ddpm_spec(student=lcm_student(guidance=5.5))
    assert with_student_of(noise_flow_spec(), {"process": student}) == student
    assert "lcm" in solvers_of(student) and "lcm" not in solvers_of(noise_flow_spec())


def test_images_know_the_shift_and_the_schedule_and_not_the_times_trained_at() -> None:
    one, other = noise_flow_spec(shift=2.0), noise_flow_spec(shift=2.0, logit_mean=0.5)
    assert _process_identity(one) == _process_identity(other)
    assert _process_identity(one) not in [_process_identity(flow_spec(shift=2.0)), _process_identity(ddpm_spec())]


def test_it_trains_resumes_and_its_files_are_those_of_ddpm(tmp_path: Path) -> None:
    run, start = make_run(tmp_path), weights(tmp_path / "former")
    changed = {"starts_from": str(start), **NOISE, "flow_shift": 2.0, "num_processes": 1, "log_every": 1}
    said = train(run, 2, num_steps=3, **changed)
    assert "process flow, noise, of which the velocity is reckoned, logit-normal times (0, 1), shift 2" in said
    assert "anew" not in said
    train(run, 2, num_steps=5, **changed)
    lines = metrics(run, 2)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["loss"] == pytest.approx(line["velocity"] + line["vlb"], rel=1e-4)
        assert line["velocity"] > line["mse"] > 0

    trained = open_run_model(run, "stage2")
    assert trained.process == noise_flow_spec(shift=2.0)
    assert spec_beside(trained.model_path) == ddpm_spec(), "diffusers draws it as it drew what it began with"
    former, model = load_diffusers(start), trained.load()
    assert model.config == former.config and not torch.equal(model.final.weight, former.final.weight)
    texts, generators = [torch.randn(3, D_TEXT), torch.randn(1, D_TEXT)], make_generators([0])
    scheduler, passes = process_of(trained.process).scheduler("euler", 3), [Pass(is_guided=True)] * 3
    network = network_of_texts(model, texts[:1], texts[1], passes=passes, guidance_scale=2.0, size_pixels=(32, 32))
    latents, _ = denoise(network, draw_noise(generators, (4, 4, 4)), scheduler, generators=generators)
    assert latents.shape == (1, 4, 4, 4) and latents.isfinite().all()

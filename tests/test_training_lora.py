"""Stages that train adapters: on two ranks under each ZeRO stage, resumed, on one rank, and what is on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_training_parts import SHAPE, losses, random_network, train_three
from torch import Tensor
from training_run import arguments, make_run

from encoders.weights import identity_of
from errors import UserError
from pipelines.command import parse_command
from pixart.adapter_files import read_adapter
from pixart.adapters import merge
from pixart.convert import load_diffusers
from pixart.model import PixArt
from sampling.foreign_weights import open_trained_model
from sampling.trained_model import open_run_model
from training.convert import main as convert
from training.data.survey import Survey
from training.loop.products import require_products
from training.objectives.objective import Trained
from training.stages.networks import blank_copy, count_parameters, count_weights, network_config
from training.stages.stage import TrainingJob, open_stage
from training.stages.starts import load_network, objective_networks, with_adapters
from training.stages.weights import WeightCounts

LORA = {"lora.targets": ["attention"], "lora.rank": 2, "lora.dora": True, "trains": "lora", "learning_rate": 1e-2}
# ZeRO stage, precision.
KINDS = ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))


@dataclass(frozen=True)
class Case:
    run: Path
    objective: str
    settings: dict[str, Any]

    def of(self, num_steps: int) -> str:
        settings = self.settings | {"num_steps": num_steps}
        return json.dumps({"run": str(self.run), "objective": self.objective, "settings": settings})

    def step(self, step: int) -> Path:
        return self.run / "training" / "stage2" / f"step-{step}"

    def weights(self, step: int) -> dict[str, Tensor]:
        return load_file(self.step(step) / "adapter" / "adapter_model.safetensors")


@dataclass(frozen=True)
class Runs:
    start: Path
    straight: dict[Any, Case]
    resumed: dict[Any, Case]
    moved: dict[Any, Case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("lora")
    features = make_run(folder) / "features"
    start = random_network(folder / "start", 1)
    shared = LORA | {"starts_from": str(start), "log_every": 1, "checkpoint_every": 100, "keep_checkpoints": 3}

    def case(name: str, kind: tuple[int, str]) -> Case:
        run = folder / f"{name}-{kind[0]}-{kind[1]}"
        run.mkdir()
        (run / "features").symlink_to(features)
        return Case(run, "denoise", shared | {"zero_stage": kind[0], "dtype": kind[1]})

    return Runs(start, *train_three(case, KINDS, folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adapters_resume_exactly_and_on_another_number_of_ranks(runs: Runs, kind: tuple[int, str]) -> None:
    straight, resumed, moved = runs.straight[kind], runs.resumed[kind], runs.moved[kind]
    assert losses(resumed) == losses(straight) and len(set(losses(straight))) == 4
    ours, theirs = resumed.weights(4), straight.weights(4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_checkpoint_holds_adapters_alone_and_says_what_they_belong_to(runs: Runs, kind: tuple[int, str]) -> None:
    folder = runs.straight[kind].step(4)
    assert not (folder / "model").exists()
    num_weights = sum(value.numel() for value in runs.straight[kind].weights(4).values())
    num_base = sum(value.numel() for value in load_diffusers(runs.start).state_dict().values())
    assert num_weights < num_base / 3
    # DeepSpeed's records of names and settings take the same for any number of weights.
    state = sum(path.stat().st_size for path in (folder / "deepspeed").iterdir())
    assert state < 16 * num_weights + 200_000
    trainer = json.loads((folder / "trainer.json").read_text())
    assert trainer["base"]["location"] == str(runs.start)
    assert trainer["base"]["identity"] == identity_of(runs.start)
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        belongs_to = json.loads(file.metadata()["pixart_atelier"])
    assert belongs_to["base"] == trainer["base"] and belongs_to["process"] == trainer["process"]


@pytest.mark.slow
def test_drawing_and_starting_take_the_weights_that_adapters_belong_to(runs: Runs, tmp_path: Path) -> None:
    case = runs.straight[KINDS[0]]
    merged = load_diffusers(runs.start).float()
    assert isinstance(merged, PixArt)
    merge(merged, [(read_adapter(case.step(4) / "adapter", merged.config), 1.0)])
    expected = merged.state_dict()

    def is_merged(weights: dict[str, Tensor]) -> bool:
        assert weights.keys() == expected.keys()
        return all(torch.equal(weight, expected[name]) for name, weight in weights.items())

    drawn = open_run_model(case.run, "stage2")
    assert is_merged(drawn.load().state_dict())
    beside = open_trained_model(str(case.step(4) / "adapter"), None)
    assert beside.identity == drawn.identity != identity_of(runs.start)
    settings = {name: value for name, value in case.settings.items() if not name.startswith("lora")}
    job = open_job(case.run, **settings | {"trains": "all", "starts_from": str(case.step(4))}, stage="stage3")
    start = job.start
    assert start.path == runs.start and start.adapters == (case.step(4) / "adapter",)
    network = load_network(start.path, None, sample_size=4, key="")
    assert is_merged(with_adapters(network, start, key="").state_dict())
    convert([str(case.run / "training" / "stage2"), str(tmp_path / "merged")])
    assert is_merged(load_diffusers(tmp_path / "merged" / "transformer").state_dict())
    # The adapter that a checkpoint is of is weighed, not added once more.
    weaker = load_diffusers(runs.start).float()
    assert isinstance(weaker, PixArt)
    merge(weaker, [(read_adapter(case.step(4) / "adapter", weaker.config), 0.6)])
    expected = weaker.state_dict()
    for number, typed in enumerate(
        ([], ["--lora", str(case.step(4))], ["--lora", str(case.run / "training" / "stage2")])
    ):
        convert([str(case.run / "training" / "stage2"), str(tmp_path / f"{number}"), *typed, "--weights", "0.6"])
        assert is_merged(load_diffusers(tmp_path / f"{number}" / "transformer").state_dict())


@pytest.mark.slow
def test_a_base_that_is_gone_or_has_changed_is_said(runs: Runs, tmp_path: Path) -> None:
    case = runs.moved[KINDS[0]]
    trainer = json.loads((case.step(4) / "trainer.json").read_text())
    trainer["base"]["location"] = str(tmp_path / "gone")
    (case.step(4) / "trainer.json").write_text(json.dumps(trainer))
    with pytest.raises(
        UserError, match=r"belongs to the weights of .*gone, which are not there any more: put them back, or"
    ):
        open_run_model(case.run, "stage2")
    random_network(tmp_path / "gone", 9)
    with pytest.raises(UserError, match=r"was trained on .*gone, whose weights are others now: put those back"):
        open_run_model(case.run, "stage2")


def open_job(run: Path, *, stage: str = "stage2", **settings: object) -> TrainingJob:
    return open_stage(parse_command("training", "", argv=arguments(run, stage, **settings), has_stages=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("job"))


def test_adapters_without_weights_to_stay_beside_are_refused(run: Path, tmp_path: Path) -> None:
    start = str(random_network(tmp_path / "start", 1))
    with pytest.raises(UserError, match=r"training\.stage2\.starts_from names none \('scratch'\): name a stage"):
        open_job(run, trains="lora", starts_from="scratch")
    with pytest.raises(UserError, match=r"'lora' keeps the weights' own output layer, .* process ddpm, and .* 'flow'"):
        open_job(run, trains="lora", starts_from=start, process="flow")
    with pytest.raises(UserError, match=r"training\.stage1\.trains = 'lora' is for a PixArt, .*network is 'dit'"):
        open_job(run, stage="stage1", trains="lora", starts_from="scratch")
    with pytest.raises(UserError, match="'fp8' does not go with trains = 'lora'"):
        require_products(open_job(run, trains="lora", starts_from=start, dtype="bf16", products="fp8").settings)
    job = open_job(run, trains="lora", starts_from=start, **{"lora.targets": ["mlp", "blocks.*.nothing"]})
    with pytest.raises(UserError, match=r"training\.stage2\.lora\.targets: 'blocks\.\*\.nothing' fits none of the 27"):
        objective_networks(job, {"network": Trained()}, PixArt(SHAPE))


def test_blocks_that_are_not_there_are_refused_with_the_key_of_the_stage(run: Path) -> None:
    for blocks in ([9], [1, 1]):
        job = open_job(run, starts_from="scratch", kv_compressed_blocks=blocks)
        survey = Survey(buckets=[], counts=[], channels=4, downsample=8, max_label=-1, num_without_size=0)
        with pytest.raises(
            UserError, match=r"recipe\.toml: training\.stage2: kv_compressed_blocks .* from 0 to 1, in ord"
        ):
            network_config(job, survey)


def test_only_adapters_train_and_blank_copies_have_them_too(run: Path, tmp_path: Path) -> None:
    start = str(random_network(tmp_path / "start", 1))
    job = open_job(run, trains="lora", starts_from=start, dtype="bf16", **{"lora.rank": 2, "lora.targets": ["mlp"]})
    networks = objective_networks(job, {"network": Trained()}, PixArt(SHAPE))
    trained = {name: weight for name, weight in networks["network"].named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {w.dtype for w in networks["network"].parameters() if not w.requires_grad} == {torch.bfloat16}
    assert sum(weight.numel() for weight in trained.values()) == 2 * 2 * 2 * (16 + 64)
    counts = count_weights({"network": Trained()}, networks)
    assert counts == WeightCounts(trained=640, frozen=count_parameters(PixArt(SHAPE)))
    blank = blank_copy(networks["network"])
    assert {n for n, w in blank.named_parameters() if w.requires_grad} == trained.keys()
    assert all(weight.is_meta for weight in blank.parameters())

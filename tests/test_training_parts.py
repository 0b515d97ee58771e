"""Stages that train a part of a network, and objectives with more than one: on two ranks, resumed, and on one."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_run import CHANNELS, D_TEXT, arguments, make_run, metrics
from warm_python import run_ranks

from errors import UserError
from pipelines.command import parse_command
from pixart.convert import load_diffusers, save_diffusers
from pixart.model import PixArt, PixArtConfig
from pixart.processes.ddpm import DDPM
from training.loop.flops import StepFlops
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Average, Frozen, Trained
from training.stages.networks import blank_copy, count_parameters, count_weights
from training.stages.stage import TrainingJob, open_stage
from training.stages.starts import objective_networks
from training.stages.trainable import freeze_others
from training.stages.weights import WeightCounts

CROSS_ATTENTION = "blocks.*.cross_attention.*"
SHAPE = PixArtConfig(
    num_layers=2, num_heads=2, head_dim=8, in_channels=CHANNELS, caption_channels=D_TEXT, sample_size=4
)


@dataclass(frozen=True)
class Case:
    """A run in which stage 2 trains for some objective."""

    run: Path
    objective: str
    settings: dict[str, Any]

    def of(self, num_steps: int) -> str:
        """Return what `objective_ranks.py` is told in order to train to that step."""
        settings = self.settings | {"num_steps": num_steps}
        return json.dumps({"run": str(self.run), "objective": self.objective, "settings": settings})

    def weights(self, step: int) -> dict[str, Tensor]:
        return load_diffusers(self.run / "training" / "stage2" / f"step-{step}" / "model").state_dict()

    def state_bytes(self, step: int) -> int:
        folder = self.run / "training" / "stage2" / f"step-{step}" / "deepspeed"
        return sum(path.stat().st_size for path in folder.iterdir())


@dataclass(frozen=True)
class Runs:
    start: Path
    teacher: Path
    straight: Case
    resumed: Case
    moved: Case
    distilled: Case
    distilled_again: Case


def train_three(case: Callable[[str, Any], Any], kinds: Sequence[Any], folder: Path) -> tuple[dict, dict, dict]:
    """Train a case of each kind for four steps: straight, resumed after two, and resumed on one rank in place of two.

    `case` makes one of a name, of which its run's folder is called, and a kind.
    """
    straight, resumed, moved = ({kind: case(name, kind) for kind in kinds} for name in ("straight", "resumed", "moved"))
    two = [straight[kind].of(4) for kind in kinds]
    for kind in kinds:
        two += [resumed[kind].of(2), resumed[kind].of(4)]
    run_ranks("objective_ranks", two, num_ranks=2, errors=folder)
    for kind in kinds:
        shutil.copytree(resumed[kind].run / "training", moved[kind].run / "training")
        (moved[kind].run / "training" / "stage2" / "latest").write_text("step-2\n")
    run_ranks("objective_ranks", [moved[kind].of(4) for kind in kinds], num_ranks=1, errors=folder)
    return straight, resumed, moved


def random_network(folder: Path, seed: int) -> Path:
    """Write a network none of whose weights is zero, so that all of them matter."""
    torch.manual_seed(seed)
    network = PixArt(SHAPE)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_diffusers(network, folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("parts")
    features = make_run(folder) / "features"
    start, teacher = random_network(folder / "start", 1), random_network(folder / "teacher", 2)
    shared = {"starts_from": str(start), "log_every": 1, "checkpoint_every": 100, "keep_checkpoints": 3}
    part = shared | {"trains": [CROSS_ATTENTION], "zero_stage": 3, "dtype": "bf16"}
    distilled = shared | {"networks.teacher": str(teacher), "zero_stage": 2}

    def case(name: str, objective: str, settings: dict[str, Any]) -> Case:
        (folder / name).mkdir()
        (folder / name / "features").symlink_to(features)
        return Case(folder / name, objective, settings)

    straight, resumed, moved = (case(name, "denoise", part) for name in ("straight", "resumed", "moved"))
    distilled, again = (case(name, "distil", distilled) for name in ("distilled", "distilled_again"))
    two = [straight.of(4), resumed.of(2), resumed.of(4), distilled.of(4), again.of(2), again.of(4)]
    run_ranks("objective_ranks", two, num_ranks=2, errors=folder)
    shutil.copytree(resumed.run / "training", moved.run / "training")
    (moved.run / "training" / "stage2" / "latest").write_text("step-2\n")
    run_ranks("objective_ranks", [moved.of(4)], num_ranks=1, errors=folder)
    return Runs(start, teacher, straight, resumed, moved, distilled, again)


def losses(case: Case) -> list[float]:
    return [line["loss"] for line in metrics(case.run, 2)]


@pytest.mark.slow
def test_what_does_not_train_stays_bit_for_bit(runs: Runs) -> None:
    before, after = load_diffusers(runs.start).state_dict(), runs.straight.weights(4)
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".cross_attention." in name}
    # DeepSpeed keeps weights, masters and moments of these alone.
    num_trained = sum(before[name].numel() for name in moved)
    assert runs.straight.state_bytes(4) < runs.distilled.state_bytes(4)
    assert 14 * num_trained < runs.straight.state_bytes(4) < 14 * num_trained + 60_000


@pytest.mark.slow
def test_a_part_resumes_exactly(runs: Runs) -> None:
    assert losses(runs.resumed) == losses(runs.straight)
    assert len(set(losses(runs.straight))) == 4
    ours, theirs = runs.resumed.weights(4), runs.straight.weights(4)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.slow
def test_a_part_resumes_on_another_number_of_ranks(runs: Runs) -> None:
    assert losses(runs.moved) == pytest.approx(losses(runs.straight), rel=1e-3)
    ours, theirs = runs.moved.weights(4), runs.straight.weights(4)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if ".cross_attention." not in name)


@pytest.mark.slow
def test_a_teacher_goes_through_training_and_resume(runs: Runs) -> None:
    assert losses(runs.distilled_again) == losses(runs.distilled)
    ours, theirs = runs.distilled_again.weights(4), runs.distilled.weights(4)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    lines = metrics(runs.distilled.run, 2)
    assert all(line["loss"] == pytest.approx(line["taught"] + line["averaged"]) for line in lines)
    assert lines[0]["averaged"] == 0, "the average starts as the student"
    assert all(line["averaged"] > 0 for line in lines[1:])
    assert lines[-1]["taught"] < lines[0]["taught"]
    files = list((runs.distilled.run / "training" / "stage2" / "step-4").rglob("*.safetensors"))
    assert len(files) == 1, "a checkpoint has no copy of the teacher"


def open_job(run: Path, **settings: object) -> TrainingJob:
    argv = arguments(run, 2, **({"starts_from": "scratch"} | settings))
    return open_stage(parse_command("training", "", argv=argv, has_stages=True))


@pytest.mark.slow
def test_another_teacher_is_refused_at_the_resume(runs: Runs, tmp_path: Path) -> None:
    case = runs.distilled
    assert open_job(case.run, **case.settings, num_steps=9).resume is not None
    other = {"networks.teacher": str(random_network(tmp_path / "other", 3))}
    with pytest.raises(UserError, match=r"was trained with training\.stage.\.networks\.teacher 'sha256:.*' now"):
        open_job(case.run, **(case.settings | other))
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all does not exist"):
        open_job(case.run, **(case.settings | {"networks.teacher": "/nowhere/at/all"}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("job"))


def test_networks_that_an_objective_lacks_or_has_no_use_for_are_refused(run: Path, tmp_path: Path) -> None:
    teacher = str(random_network(tmp_path / "teacher", 2))
    roles = {"teacher": Frozen(), "student": Trained(), "average": Average()}
    with pytest.raises(UserError, match=r"training\.stage2\.networks names no weights for 'teacher'"):
        objective_networks(open_job(run), roles, PixArt(SHAPE))
    named = open_job(run, **{"networks.teacher": teacher})
    with pytest.raises(UserError, match=r"stage2\.networks names 'teacher', but of frozen networks .* has none"):
        objective_networks(named, {"network": Trained()}, PixArt(SHAPE))
    flow = open_job(run, **{"networks.teacher": teacher, "process": "flow"})
    with pytest.raises(UserError, match=r"networks\.teacher \(.*\) was trained with process ddpm, not flow"):
        objective_networks(flow, roles, PixArt(SHAPE))
    wide = dataclasses.replace(SHAPE, caption_channels=2 * D_TEXT)
    with pytest.raises(UserError, match=rf"networks\.teacher \(.*\) has caption_channels {D_TEXT}, but .* has 32"):
        objective_networks(named, roles, PixArt(wide))
    networks = objective_networks(named, roles, PixArt(SHAPE))
    assert [weight.requires_grad for weight in networks["student"].parameters()] == [True] * 57
    assert not any(weight.requires_grad for name in ("teacher", "average") for weight in networks[name].parameters())
    num_weights = count_parameters(networks["student"])
    assert count_weights(roles, networks) == WeightCounts(trained=num_weights, beside=2 * num_weights)


def test_a_pattern_that_fits_no_weight_is_refused(run: Path) -> None:
    job = open_job(run, trains=[CROSS_ATTENTION, "block.*"])
    with pytest.raises(UserError, match=r"training\.stage2\.trains: pattern 'block\.\*' fits none of the 57 weights"):
        objective_networks(job, {"network": Trained()}, PixArt(SHAPE))


def test_an_output_layer_that_begins_anew_must_train(run: Path, tmp_path: Path) -> None:
    settings = {"starts_from": str(random_network(tmp_path / "start", 1)), "process": "flow"}
    with pytest.raises(UserError, match=r"training\.stage2\.trains leaves out final\.\*, the output layer"):
        objective_networks(open_job(run, trains=[CROSS_ATTENTION], **settings), {"network": Trained()}, PixArt(SHAPE))
    objective_networks(open_job(run, trains=["final.*"], **settings), {"network": Trained()}, PixArt(SHAPE))


def test_no_gradient_is_computed_for_what_does_not_train(run: Path) -> None:
    network = PixArt(SHAPE)
    roles = {"network": Trained()}
    networks = objective_networks(open_job(run, trains=[CROSS_ATTENTION]), roles, network)
    text = torch.randn(2, 5, D_TEXT)
    network(torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), text).square().sum().backward()
    having = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert having == {name for name, _ in network.named_parameters() if ".cross_attention." in name}
    counts = count_weights(roles, networks)
    assert counts.trained == sum(network.get_parameter(name).numel() for name in having)
    assert counts.frozen == count_parameters(network) - counts.trained


def test_frozen_weights_cost_no_operations_of_their_gradient() -> None:
    whole, part = PixArt(SHAPE), PixArt(SHAPE)
    freeze_others(part, ["blocks.1.mlp.out.weight"], key="training.stage2.trains")
    inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=None, dtype=torch.float32)
    objective = Denoise(process=DDPM(device="meta"), inputs=inputs)
    flops = [
        StepFlops(objective, {"network": blank_copy(network)}, in_channels=CHANNELS, text_width=D_TEXT)
        for network in (whole, part)
    ]
    all_train, few_train = (counter.of_samples(1, height=4, width=4, num_text_tokens=5) for counter in flops)
    # Forward, and backward through the last layer to the last block's only.
    assert all_train / 3 < few_train < 1.2 * all_train / 3

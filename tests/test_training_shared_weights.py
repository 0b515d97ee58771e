"""Weights that networks of an objective have in common: held once, and the same to the bit as if each had its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_lora import Case, open_job
from test_training_parts import SHAPE, random_network
from torch import Tensor
from training_run import make_run, metrics
from warm_python import run_ranks

from pixart.convert import load_diffusers, save_diffusers
from pixart.dit import DiT
from pixart.model import PixArt
from training.objectives.objective import Average, Frozen, Trained
from training.stages.networks import blank_copies, count_parameters, count_weights
from training.stages.starts import objective_networks
from training.stages.weights import WeightCounts

ROLES = {"network": Trained(), "target": Average(), "teacher": Frozen()}
LORA = {"trains": "lora", "lora.rank": 2, "lora.targets": ["mlp"]}
DISTIL = {"objective": "consistency", "consistency.guidance_range": [5.5, 5.5]}
NUM_WEIGHTS, NUM_ADAPTERS = count_parameters(PixArt(SHAPE)), 2 * 2 * 2 * (16 + 64)
# ZeRO stage, precision.
KINDS = ((0, "bf16"), (2, "fp32"), (3, "bf16"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_network(tmp_path_factory.mktemp("weights") / "start", 1)


def networks_of(run: Path, start: Path, teacher: Path, **settings: Any) -> dict[str, DiT | PixArt]:
    job = open_job(run, starts_from=str(start), **DISTIL, **{"networks.teacher": str(teacher)}, **settings)
    return objective_networks(job, ROLES, load_diffusers(start).float())


def places(network: DiT | PixArt) -> dict[str, int]:
    return {name.replace(".base_layer.", "."): weight.data_ptr() for name, weight in network.named_parameters()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_average_of_adapters_and_the_base_as_teacher_hold_no_base(run: Path, start: Path, dtype: str) -> None:
    networks = networks_of(run, start, start, dtype=dtype, **LORA)
    student, target, teacher = (places(networks[name]) for name in ROLES)
    adapters = {name for name in student if ".lora_" in name}
    assert {name for name in student if student[name] != target[name]} == adapters
    assert teacher == {name: place for name, place in student.items() if name not in adapters}
    expected = WeightCounts(trained=NUM_ADAPTERS, frozen=NUM_WEIGHTS, beside=NUM_ADAPTERS, shared=NUM_WEIGHTS)
    assert count_weights(ROLES, networks) == expected
    assert count_weights(ROLES, blank_copies(networks)) == expected
    assert {name for name, weight in networks["network"].named_parameters() if weight.requires_grad} == {
        name for name, _ in networks["network"].named_parameters() if ".lora_" in name
    }


def test_what_of_a_teacher_is_otherwise_is_its_own(run: Path, start: Path, tmp_path: Path) -> None:
    other = load_diffusers(start)
    with torch.no_grad():
        other.get_parameter("blocks.1.mlp.out.bias").add_(1)
    save_diffusers(other, tmp_path / "other")
    networks = networks_of(run, start, tmp_path / "other", **LORA)
    student, teacher = places(networks["network"]), places(networks["teacher"])
    assert [name for name in teacher if teacher[name] != student[name]] == ["blocks.1.mlp.out.bias"]
    own, theirs = (network.get_parameter("blocks.1.mlp.out.bias") for network in (networks["teacher"], other))
    assert torch.equal(own, theirs)
    networks = networks_of(run, start, random_network(tmp_path / "another", 2), **LORA)
    assert count_weights(ROLES, networks).beside == NUM_WEIGHTS + NUM_ADAPTERS


def test_weights_that_train_are_never_shared_though_they_begin_alike(run: Path, start: Path) -> None:
    for zero_stage in (2, 3):
        networks = networks_of(run, start, start, trains=["blocks.*.mlp.*"], zero_stage=zero_stage)
        student, target, teacher = (places(networks[name]) for name in ROLES)
        apart = {name for name in student if ".mlp." in name}
        assert all(len({student[name], target[name], teacher[name]}) == 3 for name in apart)
        assert {name for name in target if target[name] == teacher[name]} == student.keys() - apart
        is_same = {student[name] == target[name] for name in student.keys() - apart}
        assert is_same == {zero_stage == 2}, "what ZeRO 3 cuts is whole once beside it"
    networks = networks_of(run, start, start)
    assert count_weights(ROLES, networks) == WeightCounts(trained=NUM_WEIGHTS, beside=2 * NUM_WEIGHTS)


@dataclass(frozen=True)
class Runs:
    straight: dict[Any, Case]
    resumed: dict[Any, Case]
    apart: dict[Any, Case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Runs:
    """A stage of two ranks: straight, resumed after two steps, and with networks that hold all for themselves."""
    folder = tmp_path_factory.mktemp("shared")
    features = make_run(folder) / "features"
    shared = DISTIL | LORA | {"starts_from": str(start), "networks.teacher": str(start), "learning_rate": 1e-2}
    shared |= {"ema_decay": 0.5, "log_every": 1, "checkpoint_every": 100, "keep_checkpoints": 3}

    def case(name: str, kind: tuple[int, str]) -> Case:
        run = folder / f"{name}-{kind[0]}-{kind[1]}"
        run.mkdir()
        (run / "features").symlink_to(features)
        return Case(run, name, shared | {"zero_stage": kind[0], "dtype": kind[1]})

    straight, resumed, apart = ({kind: case(name, kind) for kind in KINDS} for name in ("straight", "resumed", "apart"))
    cases = [each.of(4) for runs in (straight, apart) for each in runs.values()]
    cases += [each.of(num_steps) for each in resumed.values() for num_steps in (2, 4)]
    run_ranks("objective_ranks", cases, num_ranks=2, errors=folder)
    return Runs(straight, resumed, apart)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_training_is_to_the_bit_that_of_networks_of_their_own(runs: Runs, kind: tuple[int, str]) -> None:
    def trained(case: Case) -> tuple[list[float], dict[str, Tensor]]:
        return [line["loss"] for line in metrics(case.run, 2)], case.weights(4)

    expected, weights = trained(runs.apart[kind])
    assert len(set(expected)) == 4 and any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    for found, ours in map(trained, (runs.straight[kind], runs.resumed[kind])):
        assert found == expected and ours.keys() == weights.keys()
        assert all(torch.equal(weight, ours[name]) for name, weight in weights.items())

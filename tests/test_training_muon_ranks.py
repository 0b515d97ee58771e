"""Muon under ZeRO 0 to 3 on one, two and three real gloo ranks: one plain reference on one process is what all do.

Sums over ranks are rounded otherwise than those of one process, in fp32, and so is the norm that clips; where that
moves an element over the edge between two numbers of bf16, in which matrices are orthogonalised, it differs by as much.
"""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from muon_ranks import EMA_DECAY, MATRICES, RATES, Case, batch_of, gentle, network_of
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from warm_python import WarmProcess
from zero_ranks import Weights, distance, mean_loss

from training.launch.placement import on_this_machine
from training.launch.ranks import rank_environment
from training.loop.optimizers.muon import is_matrix_of_block

# Ranks of all cases are in the first test's time.
pytestmark = pytest.mark.timeout(900)
STAGES = (0, 1, 2, 3)


def case_of(name: str, zero_stage: int, *, saves: bool = False, from_case: str | None = None, **values: Any) -> Case:
    is_gentle = not name.endswith("torch")
    values |= {"zero_stage": zero_stage}
    return Case(name=name, values=values, saves=saves, from_case=from_case, is_gentle=is_gentle)


# In this order, as a case may go on from one of fewer or more ranks.
CASES: dict[int, list[Case]] = {
    2: [
        *(case_of(f"2-{stage}", stage, saves=True) for stage in STAGES),
        *(case_of(f"2-{stage}-twice", stage, gradient_accumulation_steps=2) for stage in (2, 3)),
        *(case_of(f"2-{stage}-lora", stage, trains="lora") for stage in (1, 3)),
        *(case_of(f"2-{stage}-part", stage, trains=MATRICES) for stage in (2, 3)),
        *(case_of(f"2-{stage}-bf16", stage, dtype="bf16") for stage in (0, 1, 3)),
        case_of("2-3-torch", 3),
    ],
    1: [
        *(case_of(f"1-{stage}", stage) for stage in (0, 2)),
        case_of("1-3-from-2", 3, from_case="2-3"),
        case_of("1-0-offload", 0, dtype="bf16", offload="optimizer"),
        case_of("1-0-bf16", 0, dtype="bf16"),
    ],
    3: [
        *(case_of(f"3-{stage}", stage) for stage in (2, 3)),
        case_of("3-1-from-2", 1, from_case="2-1"),
        case_of("3-1-torch", 1),
    ],
}


def run(folder: Path, cases: list[Case], *, num_ranks: int) -> None:
    environment = rank_environment(on_this_machine(num_ranks), threads_per_rank=1, errors=str(folder))
    arguments = [str(folder), *(json.dumps(asdict(case)) for case in cases)]
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    ranks = [WarmProcess("muon_ranks", arguments, changed=environment | each) for each in numbers]
    said = [rank.communicate(timeout=400)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for num_ranks, cases in CASES.items():
        run(folder, cases, num_ranks=num_ranks)
    return folder


def found(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def weights_of(folder: Path, name: str) -> dict[str, Weights]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def reference(case: Case) -> tuple[dict[str, Weights], list[float], Weights]:
    """Train a case's steps on the whole batch, by plain formulas and torch's AdamW.

    Return what `muon_ranks` gathers, the norms of gradients, and the weights at the start.
    """
    settings, network = case.settings, network_of(case.settings)
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    start = {name: weight.detach().clone() for name, weight in trained.items()}
    matrices = [name for name, weight in trained.items() if is_matrix_of_block(name, weight)]
    others = [weight for name, weight in trained.items() if name not in matrices]
    adamw = torch.optim.AdamW(others, betas=settings.adam_betas, weight_decay=settings.weight_decay) if others else None
    average, norms = {name: weight.clone() for name, weight in start.items()}, []
    moments = {name: torch.zeros_like(start[name]) for name in matrices}
    plain: Any = SimpleNamespace(engine=network, dtype=torch.float32)
    for step, rate in enumerate(RATES):
        network.zero_grad()
        mean_loss(plain, batch_of(step), slice(None)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), settings.gradient_clip)))
        for name in matrices:
            step_matrix(trained[name], moments[name], rate=3 * rate, case=case)
        if adamw is not None:
            adamw.param_groups[0]["lr"] = rate
            adamw.step()
        for name, weight in trained.items():
            average[name] = EMA_DECAY * average[name] + (1 - EMA_DECAY) * weight.detach()
    masters = {name: weight.detach() for name, weight in trained.items()}
    return {"masters": masters, "ema": average, "moments": moments}, norms, start


@torch.no_grad()
def step_matrix(weight: torch.nn.Parameter, moment: Tensor, *, rate: float, case: Case) -> None:
    """Step as Muon does (Jordan et al., 2024), at the size of AdamW's update (Liu et al., 2025)."""
    assert weight.grad is not None
    moment.mul_(0.95).add_(0.05 * weight.grad)
    ahead = 0.05 * weight.grad + 0.95 * moment
    if case.is_gentle:
        update = gentle(ahead.bfloat16()[None])[0]
    else:
        update = _zeropower_via_newtonschulz(ahead, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    weight.mul_(1 - rate * case.settings.weight_decay).sub_(rate * 0.2 * max(weight.shape) ** 0.5 * update.float())


def error_of(ours: Weights, theirs: Weights, start: Weights) -> float:
    """Return how far apart weights are, in sizes of how far the others have gone."""
    assert ours.keys() == theirs.keys()
    return distance(ours, theirs) / distance(theirs, start)


def names(*, marks: tuple[str, ...] = ("",)) -> list[str]:
    """Names of the cases in fp32 that train from the start, with such an end."""
    cases = [case for cases in CASES.values() for case in cases if case.from_case is None]
    return [case.name for case in cases if any(case.name == f"{case.name[:3]}{mark}" for mark in marks)]


def case_named(name: str) -> Case:
    return next(case for cases in CASES.values() for case in cases if case.name == name)


@pytest.mark.slow
@pytest.mark.parametrize("name", names(marks=("", "-twice", "-lora", "-part", "-torch")))
def test_ranks_step_as_one_process_does(folder: Path, name: str) -> None:
    case, ours = case_named(name), weights_of(folder, name)
    theirs, norms, start = reference(case)
    tolerance = 5e-3 if case.is_gentle else 0.5
    assert [step["norm"] for step in found(folder, name)["steps"]] == pytest.approx(norms, rel=tolerance / 100)
    assert min(norms) > 10 * case.settings.gradient_clip, "all are clipped"
    assert error_of(ours["masters"], theirs["masters"], start) < tolerance / 10
    assert error_of(ours["ema"], theirs["ema"], start) < tolerance / 10
    zeros = {weight: torch.zeros_like(moment) for weight, moment in theirs["moments"].items()}
    assert error_of({weight: ours["moments"][weight] for weight in zeros}, theirs["moments"], zeros) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_in_bf16_ranks_step_as_one_does(folder: Path, stage: int) -> None:
    """Other sums of gradients, in bf16, take them no further apart than bf16 takes one rank from itself in fp32."""
    network = network_of(case_named("1-0-bf16").settings)
    start = {name: weight.detach() for name, weight in network.named_parameters()}
    one, two = (weights_of(folder, name)["masters"] for name in ("1-0-bf16", f"2-{stage}-bf16"))
    in_fp32, unshared = (weights_of(folder, name)["masters"] for name in ("1-0", "2-0-bf16"))
    assert error_of(two, unshared, start) < 5e-3
    assert error_of(two, one, start) < 1.5 * error_of(one, in_fp32, start) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", names(marks=("", "-lora", "-part", "-bf16")))
def test_an_update_is_measured_as_copies_have_it(folder: Path, name: str) -> None:
    result = found(folder, name)
    clip = case_named(name).settings.gradient_clip
    for (change, gradient, from_copies), step in zip(result["measured"], result["steps"], strict=True):
        assert change == pytest.approx(from_copies, rel=1e-4) and change > 0
        assert gradient == pytest.approx(clip, rel=1e-2) and step["norm"] > 10 * clip


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_it_resumes_to_the_bit_and_a_skipped_step_changes_nothing(folder: Path, stage: int) -> None:
    result = found(folder, f"2-{stage}")
    assert result["resumes_exactly"] and result["skips"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "former"), [("1-3-from-2", "2-3"), ("3-1-from-2", "2-1")])
def test_other_ranks_go_on_from_the_same_weights_averages_and_moments(folder: Path, name: str, former: str) -> None:
    result = found(folder, name)
    assert result["is_elastic"] and result["loads_exactly"]
    start = weights_of(folder, former)["masters"]
    ours, theirs = (torch.load(folder / f"{each}-after.pt", weights_only=True) for each in (name, former))
    assert error_of(ours, theirs, start) < 2e-3


@pytest.mark.slow
def test_a_matrix_has_one_moment_on_any_ranks(folder: Path) -> None:
    weights = weights_of(folder, "1-0")["masters"]
    are_matrices = [is_matrix_of_block(name, weight) for name, weight in weights.items()]
    # And a count of steps, and what stands in the place of a second moment.
    sizes = [4 * weight.numel() * (1 if one else 2) for one, weight in zip(are_matrices, weights.values(), strict=True)]
    whole = found(folder, "1-0")["state_bytes"]
    assert whole == sum(sizes) + sum(8 if one else 4 for one in are_matrices)
    for name, num_ranks in {"2-1": 2, "2-3": 2, "3-2": 3, "3-1-from-2": 3, "1-3-from-2": 1}.items():
        assert found(folder, name)["state_bytes"] == pytest.approx(sum(sizes) / num_ranks, rel=5e-3), name


@pytest.mark.slow
def test_what_is_left_on_the_host_changes_no_bit(folder: Path) -> None:
    ours, theirs = (weights_of(folder, name) for name in ("1-0-offload", "1-0-bf16"))
    for name, weights in theirs.items():
        assert all(torch.equal(weight, ours[name][key]) for key, weight in weights.items()), name

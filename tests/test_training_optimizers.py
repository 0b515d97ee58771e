"""Moments in 8 bits: what torchao's optimizer does, of all weights, under every ZeRO, skipped and resumed as others."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from torchao.optim import AdamW8bit as TorchaoAdamW
from warm_python import run_ranks

from errors import UserError
from training.config import StageTraining
from training.launch.reckoning import MOMENT_BYTES
from training.loop.host import require_offload
from training.loop.optimizers import adamw8bit
from training.loop.optimizers.adamw8bit import AdamW8bit

SETTINGS = StageTraining(network="pixart", optimizer="adamw8bit", learning_rate=1e-2, weight_decay=0.1)
STAGES = ("0", "1", "2", "3")


def stepped(optimizer: AdamW8bit, weight: nn.Parameter, *, step: int) -> None:
    weight.grad = gradient_of(weight, step)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    optimizer.step()


def gradient_of(weight: nn.Parameter, step: int) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) * 1e-2


def test_a_weight_is_stepped_as_torchaos_optimizer_steps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # the same numbers, without 19 s
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 64 * 128).view(64, 128)) for _ in range(2))
    optimizer = AdamW8bit([ours], SETTINGS)
    expected = TorchaoAdamW([theirs], lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay)
    for step in range(5):
        stepped(optimizer, ours, step=step)
        theirs.grad = gradient_of(theirs, step)
        expected.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    codes = expected.state[theirs]["exp_avg_sq"].codes.flatten()
    differ = (optimizer.state[ours]["exp_avg_sq"].int() - codes.int()).abs()
    assert differ.max() <= 1 and (differ > 0).float().mean() < 1e-2, "of what lies between two codes"


@pytest.mark.parametrize("num_elements", [5, 256, 1000, 5000])
def test_weights_of_all_sizes_are_in_8_bits_piece_by_piece(num_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = (nn.Parameter(torch.linspace(-1, 1, num_elements)) for _ in range(2))
    optimizers = [AdamW8bit([weight], SETTINGS) for weight in (whole, pieces)]
    for step in range(3):
        stepped(optimizers[0], whole, step=step)
        with monkeypatch.context() as patched:
            patched.setattr(adamw8bit, "PIECE_SIZE", 512)
            stepped(optimizers[1], pieces, step=step)
    assert torch.equal(whole, pieces)
    state = optimizers[0].state[whole]
    num_blocks = -(-num_elements // 256)
    assert state["exp_avg"].nbytes + state["exp_avg_scale"].nbytes == num_blocks * (256 + 4)
    assert MOMENT_BYTES["adamw8bit"] * 256 == 2 * (256 + 4)


def test_a_skipped_step_changes_nothing_and_is_not_counted() -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 700))
    optimizer = AdamW8bit([weight], SETTINGS)
    stepped(optimizer, weight, step=0)
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(float("nan")), torch.tensor(1.0)
    optimizer.change = torch.zeros((), dtype=torch.float64)
    optimizer.step()
    after = [weight.detach(), *optimizer.state[weight].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.change == 0


@pytest.fixture(scope="module", params=[("bf16", 1), ("fp32", 2)], ids=str)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    dtype, num_ranks = request.param
    folder = tmp_path_factory.mktemp(dtype)
    run_ranks("optimizer_ranks", [str(folder), dtype, *STAGES], num_ranks=num_ranks, errors=folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_under_every_zero_moments_are_codes_and_losses_those_of_adamw(
    results: dict[str, dict[str, Any]], stage: str
) -> None:
    found = results[stage]
    assert found["are_codes"]
    # Without ZeRO each bias has a block of its own.
    assert found["bytes_of_an_element"] < (3 if stage == "0" else 2.1)
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-3)
    assert found["change"][0] == pytest.approx(found["change"][1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_critic_is_clipped_by_its_own_gradient_alone(results: dict[str, dict[str, Any]], stage: str) -> None:
    for optimizer, difference in results[stage]["difference_of_critics"].items():
        assert difference < 0.02, f"of {optimizer}: whatever the network beside it learns"


@pytest.mark.slow
def test_what_is_left_on_the_host_changes_no_bit(results: dict[str, dict[str, Any]]) -> None:
    for same in results.get("offload", {}).values():
        assert same == dict.fromkeys(("average", "optimizer", "resumed", "summed in fp32"), True)


@pytest.mark.parametrize(
    ("settings", "num_ranks", "named"),
    [
        ({"dtype": "fp32"}, 1, "training.dtype = 'fp32'"),
        ({"zero_stage": 2}, 1, "training.zero_stage = 2"),
        ({}, 2, "ranks = 2"),
    ],
)
def test_an_optimizer_on_the_cpu_is_for_one_rank(settings: dict[str, Any], num_ranks: int, named: str) -> None:
    with pytest.raises(UserError, match=f"offload = 'optimizer' is for one rank in bf16 under ZeRO 0, and {named}: "):
        require_offload(StageTraining(network="pixart", offload="optimizer", **settings), num_ranks=num_ranks)
    require_offload(StageTraining(network="pixart", offload="average", **settings), num_ranks=num_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_it_skips_and_resumes_exactly_and_refuses_other_ranks(results: dict[str, dict[str, Any]], stage: str) -> None:
    found = results[stage]
    assert found["resumes_exactly"] and found["skips"]
    if stage == "0":
        assert found["refusal"] == "False", "all ranks have all of it"
    else:
        assert "whose blocks of 8 bits are not shared out anew" in found["refusal"]

"""Muon for the matrices of blocks: torch's own, beside torch's AdamW for the rest; skipped, refused and told apart.

How it resumes on several ranks and in bf16 is in `test_training_optimizers.py`, whose ranks try it, too.
"""

from typing import Any

import pytest
import torch
from test_training_other_vae import random_pixart
from torch import nn

from errors import UserError
from training.config import StageTraining
from training.loop.optimizers import muon
from training.loop.optimizers.muon import Muon, MuonOfBlocks, is_matrix_of_block
from training.loop.optimizers.whole_matrices import require_whole_matrices

SETTINGS = StageTraining(network="pixart", optimizer="muon", learning_rate=1e-2, weight_decay=0.1)


def weights_of(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"blocks.0.mlp.hidden.weight": (24, 8), "blocks.0.mlp.hidden.bias": (24,)}
    shapes |= {"blocks.1.mlp.hidden.weight": (24, 8), "blocks.1.mlp.out.weight": (8, 24), "final.weight": (6, 8)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def give_gradients(weights: dict[str, nn.Parameter], step: int) -> None:
    for weight, gradient in zip(weights.values(), weights_of(step + 1).values(), strict=True):
        weight.grad = gradient.detach().clone()


def step_as_rule_says(optimizer: Muon, *, grad_scale: float = 1.0, is_skipped: bool = False) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(grad_scale), torch.tensor(float(is_skipped))
    optimizer.step()


@pytest.mark.parametrize("taken_at_once", [1, 10_000])
def test_matrices_of_blocks_go_by_torchs_muon_and_the_rest_by_its_adamw(
    taken_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "TAKEN_AT_ONCE", taken_at_once)
    ours, theirs = weights_of(0), weights_of(0)
    optimizer = Muon(ours, SETTINGS)
    matrices = [weight for name, weight in theirs.items() if is_matrix_of_block(name, weight)]
    assert len(matrices) == 3
    rest = [weight for name, weight in theirs.items() if not is_matrix_of_block(name, weight)]
    rate_and_decay: Any = {"lr": SETTINGS.learning_rate, "weight_decay": SETTINGS.weight_decay}
    expected = (
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rate_and_decay),
        torch.optim.AdamW(rest, **rate_and_decay),
    )
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.change = torch.zeros((), dtype=torch.float64)
        before = [weight.detach().clone() for weight in ours.values()]
        step_as_rule_says(optimizer)
        for each in expected:
            each.step()
        # Products of batches in bf16 are rounded elsewhere.
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2e-4, msg=name)
        changes = [(new.detach() - old).square().sum() for new, old in zip(ours.values(), before, strict=True)]
        assert float(optimizer.change) == pytest.approx(float(sum(changes)), rel=1e-4)


def test_clipping_divides_gradients_and_a_skipped_step_changes_nothing() -> None:
    clipped, plain = weights_of(0), weights_of(0)
    optimizers = Muon(clipped, SETTINGS), Muon(plain, SETTINGS)
    give_gradients(clipped, 0)
    give_gradients(plain, 0)
    for weight in plain.values():
        assert weight.grad is not None
        weight.grad /= 4
    step_as_rule_says(optimizers[0], grad_scale=4.0)
    step_as_rule_says(optimizers[1])
    assert all(torch.equal(weight, plain[name]) for name, weight in clipped.items())
    rule, weight = MuonOfBlocks(), clipped["blocks.0.mlp.hidden.weight"]
    assert rule.first_moment(optimizers[0], weight).any()

    state = [value for each in optimizers[0].state.values() for value in each.values()]
    before = [value.detach().clone() for value in [*clipped.values(), *state]]
    for weight in clipped.values():
        weight.grad = torch.full_like(weight, float("nan"))
    optimizers[0].change = torch.zeros((), dtype=torch.float64)
    step_as_rule_says(optimizers[0], grad_scale=float("nan"), is_skipped=True)
    assert all(torch.equal(new, old) for new, old in zip([*clipped.values(), *state], before, strict=True))
    assert optimizers[0].change == 0


def test_of_a_pixart_it_takes_the_linear_layers_of_blocks() -> None:
    taken = {name for name, weight in random_pixart(channels=4).named_parameters() if is_matrix_of_block(name, weight)}
    layers = [f"attention.{name}" for name in ("query", "key", "value", "out")]
    layers += [f"cross_{layer}" for layer in layers] + ["mlp.hidden", "mlp.out"]
    assert taken == {f"blocks.{number}.{layer}.weight" for number in range(2) for layer in layers}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_shares_of_matrices_are_refused(zero_stage: int) -> None:
    settings = StageTraining(network="pixart", optimizer="muon", zero_stage=zero_stage)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=rf"optimizer = 'muon' wants whole matrices, and .*zero_stage = {zero_stage} "):
        require_whole_matrices(settings)
    require_whole_matrices(settings.model_copy(update={"optimizer": "adamw"}))
    require_whole_matrices(settings.model_copy(update={"zero_stage": 0}))

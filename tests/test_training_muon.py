"""Muon for the matrices of blocks: torch's own, beside torch's AdamW for the rest; skipped, refused and told apart.

How ranks share it, and how it resumes, is in `test_training_muon_ranks.py`.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from test_training_other_vae import random_pixart
from torch import nn

from training.config import StageTraining
from training.loop.layout import Placed, flat_layout, shared_layout
from training.loop.log import rate_of_matrices
from training.loop.optimizers import muon, turns
from training.loop.optimizers.muon import Muon, MuonOfBlocks, is_matrix_of_block
from training.loop.optimizers.newton_schulz import num_multiplications
from training.loop.optimizers.turns import owners

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


@pytest.mark.parametrize("taken_at_once", [1, 250, 10_000])
def test_matrices_of_blocks_go_by_torchs_muon_and_the_rest_by_its_adamw(
    taken_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "TAKEN_AT_ONCE", taken_at_once)
    monkeypatch.setattr(turns, "TAKEN_AT_ONCE", taken_at_once)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's products are then ours on a CPU
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
        # What is orthogonalised was rounded to bf16.
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


def test_a_state_from_when_a_matrix_had_its_average_alone_goes_on_as_it_was() -> None:
    going_on, resumed = weights_of(0), weights_of(0)
    optimizers = Muon(going_on, SETTINGS), Muon(resumed, SETTINGS)
    give_gradients(going_on, 0)
    step_as_rule_says(optimizers[0])
    former = optimizers[0].state_dict()
    for number, (name, weight) in enumerate(going_on.items()):
        resumed[name].data.copy_(weight.data)
        if is_matrix_of_block(name, weight):
            former["state"][number] = {"exp_avg": former["state"][number]["exp_avg"].clone()}
    optimizers[1].load_state_dict(copy.deepcopy(former))
    for weights, optimizer in zip((going_on, resumed), optimizers, strict=True):
        give_gradients(weights, 1)
        step_as_rule_says(optimizer)
    assert all(torch.equal(weight, resumed[name]) for name, weight in going_on.items())


def placed(shapes: list[tuple[int, int]], *, num_ranks: int, is_flat: bool) -> list[Placed]:
    weights, sizes = [nn.Parameter(torch.zeros(0)) for _ in shapes], [torch.Size(shape) for shape in shapes]
    begins = [sum(size.numel() for size in sizes[:number]) for number in range(len(sizes))]
    master = torch.zeros(-(-sum(size.numel() for size in sizes) // num_ranks))
    if is_flat:
        return flat_layout(weights, sizes, begins=begins, master=master, rank=0, num_ranks=num_ranks).weights
    return shared_layout(weights, sizes, master=master, rank=0, num_ranks=num_ranks).weights


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 64])
def test_ranks_have_all_of_each_matrix_once_and_about_as_much_to_do(num_ranks: int, is_flat: bool) -> None:
    shapes = [(24, 24), (24, 24), (96, 24), (24, 96), (24, 25)] * 12
    weights = placed(shapes, num_ranks=num_ranks, is_flat=is_flat)
    for weight in weights:
        stretches = [stretch for stretch in weight.stretches if stretch.length]
        assert stretches[0].start == 0 and sum(stretch.length for stretch in stretches) == weight.shape.numel()
        assert all(one.start + one.length == next.start for one, next in itertools.pairwise(stretches))
    found = owners(weights, num_ranks=num_ranks)
    work = [0] * num_ranks
    for weight, owner in zip(weights, found, strict=True):
        lengths = [stretch.length for stretch in weight.stretches]
        assert lengths[owner] >= max(lengths) / 2, "and none travels that one rank has"
        work[owner] += num_multiplications(weight.shape)
    largest = num_multiplications(torch.Size((96, 24)))
    assert max(work) <= sum(work) / num_ranks + 1.5 * largest


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ({"optimizer": "muon", "muon_learning_rate": 6e-3}, {"muon_learning_rate": 3e-3}),
        ({"optimizer": "muon"}, {}),
        ({"optimizer": "adamw"}, {}),
    ],
)
def test_metrics_have_the_rate_of_matrices_where_it_is_another(typed: dict[str, Any], shown: dict[str, float]) -> None:
    settings = StageTraining(network="pixart", learning_rate=2e-3, **typed)
    assert rate_of_matrices(settings, 1e-3) == pytest.approx(shown)

"""Layers that keep less for the backward pass than autograd would, and give the same gradients."""

import pytest
import torch
from torch import Tensor, nn

from pixart.layers import MLP, RecomputedLinear, gelu, modulate


class Kept:
    """Counts the tensors' bytes that the backward pass keeps, weights aside."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 5, 8), (2, 1, 8), (2, 1, 8))
    x, shift, scale = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return x, shift, scale


@pytest.mark.parametrize(("prepare", "count"), [(modulate, 3), (gelu, 1)], ids=["modulate", "gelu"])
def test_gradients_are_right(prepare, count):
    layer = RecomputedLinear(8, 3, prepare=prepare).double()
    values = inputs()[:count]

    def apply(weight: Tensor, bias: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, values)

    assert torch.autograd.gradcheck(apply, (layer.weight, layer.bias, *values))


def test_bf16_gradients_equal_those_of_the_plain_layer():
    layer = RecomputedLinear(8, 3, prepare=modulate).bfloat16()
    variables = (*inputs(torch.bfloat16), layer.weight, layer.bias)
    values = variables[:3]
    actual = torch.autograd.grad(layer(*values).sum(), variables)
    expected = torch.autograd.grad(nn.functional.linear(modulate(*values), layer.weight, layer.bias).sum(), variables)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_it_is_the_plain_layer():
    mlp = MLP(8, 32, 8, is_modulated=True).double()
    values = inputs()
    expected = torch.autograd.grad(mlp(*values).sum(), values)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(*values).sum(), values)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_recomputed_is_not_kept():
    mlp = MLP(8, 32, 8, is_modulated=True).double()
    x, shift, scale = inputs()
    kept = Kept(mlp)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        mlp(x, shift, scale)
    hidden_bytes = 4 * x.nbytes
    assert sum(kept.storages.values()) == x.nbytes + shift.nbytes + scale.nbytes + hidden_bytes

"""What plain layers let others do: 8-bit weights, adapters, autocast, freezing, higher derivatives, compiling."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig

CONFIGS = {
    "pixart": PixArtConfig(num_layers=2, num_heads=2, head_dim=16, caption_channels=24, sample_size=8),
    "dit": DiTConfig(num_layers=2, num_heads=2, head_dim=16, num_classes=10, sample_size=8),
}
NETWORKS = pytest.mark.parametrize("name", CONFIGS)


def network_of(name: str) -> PixArt | DiT:
    config = CONFIGS[name]
    network = PixArt(config) if isinstance(config, PixArtConfig) else DiT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5, generator=generator)
    return network


def latents_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def call_of(network: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """The network as a function of latents."""
    timesteps = torch.tensor([17, 800])
    if name == "dit":
        return lambda latents: network(latents, timesteps, torch.tensor([3, 10]))
    text = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    return lambda latents: network(latents, timesteps, text, mask)


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


@NETWORKS
def test_linear_layers_are_linear_layers(name):
    network = network_of(name)
    layers = linear_layers(network)
    assert {type(layer) for layer in layers.values()} == {nn.Linear}
    held = sum(parameter.numel() for layer in layers.values() for parameter in layer.parameters())
    others = {"patch_embed.projection", "modulation.embedding", "final_modulation.embedding", "label_embed"}
    rest = [key for key, _ in network.named_parameters() if key.rpartition(".")[0] not in layers]
    assert held > 0 and all(any(key.startswith(part) or part in key for part in others) for key in rest), rest


@NETWORKS
@pytest.mark.filterwarnings("ignore")  # torchao's own, at its import
def test_eight_bit_weights(name):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    network = network_of(name)
    expected = call_of(network, name)(latents_of()).detach()
    quantize_(network, Int8WeightOnlyConfig())
    assert all(type(layer.weight) is not nn.Parameter for layer in linear_layers(network).values())
    with torch.no_grad():
        found = call_of(network, name)(latents_of())
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()


@NETWORKS
@pytest.mark.filterwarnings("ignore")  # peft's own, at its import
def test_adapters_on_every_linear_layer(name):
    from peft import LoraConfig, inject_adapter_in_model

    network = network_of(name)
    names = list(linear_layers(network))
    plain = call_of(network, name)(latents_of()).detach()
    adapted = inject_adapter_in_model(LoraConfig(r=4, target_modules=names, init_lora_weights=False), network)
    output = call_of(adapted, name)(latents_of())
    output.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in adapted.named_parameters()}
    assert sum("lora_" in key for key in gradients) == 2 * len(names)
    assert all((gradient is not None) == ("lora_" in key) for key, gradient in gradients.items())
    assert all(gradient.abs().max() > 0 for gradient in gradients.values() if gradient is not None)
    for module in adapted.modules():
        if hasattr(module, "merge"):
            module.merge()
    merged = call_of(adapted, name)(latents_of())
    torch.testing.assert_close(merged, output, rtol=1e-5, atol=1e-5)
    assert (merged - plain).norm() > 0.05 * plain.norm()


@NETWORKS
def test_autocast(name):
    network = network_of(name)
    expected = call_of(network, name)(latents_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call_of(network, name)(latents_of())
    assert found.dtype == torch.bfloat16
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    found.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes[tuple(result.shape)] += 1
        return result


def backward_products(network: nn.Module, name: str) -> Products:
    output = call_of(network, name)(latents_of())
    with Products() as products:
        output.square().sum().backward()
    return products


@NETWORKS
def test_no_gradient_is_computed_for_frozen_weights(name):
    network = network_of(name)
    everything = backward_products(network, name)
    network.zero_grad()
    network.requires_grad_(False)
    trained = ("blocks.0.attention.query", "blocks.1.mlp.out")
    for part in trained:
        network.get_submodule(part).requires_grad_(True)
    some = backward_products(network, name)
    found = {key for key, parameter in network.named_parameters() if parameter.grad is not None}
    assert found == {f"{part}.{kind}" for part in trained for kind in ("weight", "bias")}
    # A product per frozen weight is left out, and the ones that would only lead to earlier layers.
    num_frozen = len(linear_layers(network)) - len(trained)
    assert sum(everything.shapes.values()) - sum(some.shapes.values()) >= num_frozen
    # The hidden layer of the MLP has a weight of a shape of its own.
    hidden = tuple(network.get_parameter("blocks.0.mlp.hidden.weight").shape)
    assert everything.shapes[hidden] == 2 and some.shapes[hidden] == 0


@NETWORKS
def test_derivatives_of_derivatives_and_forward_ones(name):
    network = network_of(name).double()
    call = call_of(network, name, torch.float64)
    latents, direction = latents_of(torch.float64), torch.randn(2, 4, 8, 12, dtype=torch.float64)
    step = 1e-4
    with sdpa_kernel(SDPBackend.MATH):
        _, forward = torch.func.jvp(call, (latents,), (direction,))
        difference = (call(latents + step * direction) - call(latents - step * direction)) / (2 * step)
        torch.testing.assert_close(forward, difference, rtol=1e-5, atol=1e-6)

        def gradient(at: Tensor, *, create_graph: bool = False) -> Tensor:
            at = at if at.requires_grad else at.detach().requires_grad_()
            return torch.autograd.grad(call(at).square().sum(), at, create_graph=create_graph)[0]

        at = latents.clone().requires_grad_()
        (product,) = torch.autograd.grad((gradient(at, create_graph=True) * direction).sum(), at)
        difference = (gradient(latents + step * direction) - gradient(latents - step * direction)) / (2 * step)
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-5)


@NETWORKS
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at the inputs' gradients
def test_a_block_compiles_as_one_graph(name):
    network = network_of(name)
    expected = call_of(network, name)(latents_of())
    expected.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    network.zero_grad()
    for block in network.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    found = call_of(network, name)(latents_of())
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-4)

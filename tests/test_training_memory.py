"""What blocks keep for the backward pass: fewer bytes, the same gradients, and names of weights that stay."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from training.loop.memory import PRODUCTS, keep_activations

PIXART = PixArtConfig(num_layers=3, num_heads=2, head_dim=16, caption_channels=20, sample_size=32)
DIT = DiTConfig(num_layers=3, num_heads=2, head_dim=16, num_classes=10, sample_size=32)
UNIT = 4 * 256 * 32 * 4  # bytes of batch x tokens x width
COMPRESSED = replace(PIXART, kv_compressed_blocks=(1, 2))
CONFIGS = pytest.mark.parametrize("config", [PIXART, DIT], ids=["pixart", "dit"])


class Created(TorchDispatchMode):
    """Counts operations, and the living among the storages that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.counts[function] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.storages[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        return result

    @property
    def living_bytes(self) -> int:
        return sum(nbytes for storage, nbytes in self.storages.items() if not storage.expired())


def network_of(config: PixArtConfig | DiTConfig, kept: Any) -> nn.Module:
    network = PixArt(config) if isinstance(config, PixArtConfig) else DiT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5, generator=generator)
    keep_activations(network, kept)
    return network


def output_of(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, timesteps = torch.randn(4, 4, 32, 32, generator=generator), torch.tensor([0, 300, 600, 999])
    if isinstance(network, DiT):
        return network(latents, timesteps, torch.tensor([1, 2, 3, 10]))
    text = torch.randn(4, 6, 20, generator=generator)
    return network(latents, timesteps, text, torch.arange(6) < torch.tensor([6, 2, 3, 1])[:, None])


def units_of_a_block(config: PixArtConfig | DiTConfig, kept: Any) -> float:
    network = network_of(config, kept)
    with Created() as created:
        output = output_of(network)
        living_bytes = created.living_bytes
    output.sum().backward()
    return living_bytes / config.num_layers / UNIT


@CONFIGS
def test_the_less_is_kept_the_less_memory_is_taken(config):
    kept_all, products, inputs = (units_of_a_block(config, kept) for kept in ("all", "products", "inputs"))
    # Results of norms, modulation, GELU (4 units) and sums; then those of products (the hidden layer: 4) and attention.
    assert kept_all - products == pytest.approx(9, abs=0.3)
    assert products - inputs == pytest.approx(13 if isinstance(config, PixArtConfig) else 10, abs=0.3)


@pytest.mark.parametrize("config", [PIXART, COMPRESSED, DIT], ids=["pixart", "compressed", "dit"])
@pytest.mark.parametrize("kept", ["products", "inputs"])
def test_gradients_are_those_of_keeping_all(config, kept):
    expected, network = network_of(config, "all"), network_of(config, kept)
    assert list(network.state_dict()) == list(expected.state_dict())
    for each in (expected, network):
        output_of(each).square().sum().backward()
    for (name, parameter), other in zip(network.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@CONFIGS
def test_products_are_not_computed_again(config):
    def products(kept: Any) -> int:
        output = output_of(network_of(config, kept))
        with Created() as created:
            output.sum().backward()
        return sum(count for operation, count in created.counts.items() if operation in PRODUCTS)

    assert products("products") == products("all") < products("inputs")


def test_without_gradients_nothing_is_kept_or_wrapped():
    network = network_of(PIXART, "products")
    with torch.no_grad():
        assert torch.equal(output_of(network), output_of(network_of(PIXART, "all")))

"""Blocks against diffusers' with the same weights: the same numbers, and no byte more beside products."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixart.attention import pack
from pixart.dit import DiT, DiTConfig
from pixart.layouts import dit_diffusers_copies, dit_diffusers_layout, export_weights, pixart_diffusers_layout
from pixart.model import PixArt, PixArtConfig, pack_text

BATCH, GRID, NUM_TEXT = 3, (4, 6), 5
NUM_TOKENS = GRID[0] * GRID[1]
PIXART = PixArtConfig(num_layers=1, num_heads=4, head_dim=16, caption_channels=20, sample_size=8)
DIT = DiTConfig(num_layers=1, num_heads=4, head_dim=16, num_classes=10, sample_size=8, timestep_shift=1)
aten = torch.ops.aten
COMPUTE = {
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
COPIES = {aten.clone.default, aten.copy_.default, aten._to_copy.default, aten.contiguous.default}
TERNARY = ("addcmul", "addcdiv", "lerp", "where")


@dataclass
class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, except for views, matrix products and attention."""

    num_bytes: int = 0
    counts: Counter[Any] = field(default_factory=Counter)
    broadcast_ternary: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.counts[function] += 1
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(function.__name__.startswith(name) for name in TERNARY) and len({each.shape for each in operands}) > 1:
            self.broadcast_ternary.append(function.__name__)
        if not function.is_view and function not in COMPUTE and function != aten._unsafe_view.default:
            self.num_bytes += sum(map(touched_bytes, operands + results))
        return result


def touched_bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor's elements: what is expanded is read once."""
    sides = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(sides).numel() * tensor.element_size()


class Given(nn.Module):
    """In place of diffusers' embedding inside its first norm: both blocks are given the same condition."""

    def __init__(self, condition: Tensor) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.condition


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5, generator=generator)


def shape_of(config: PixArtConfig | DiTConfig) -> dict[str, int]:
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "sample_size": config.sample_size,
    }


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


Call = Callable[[Tensor], Tensor]


def pixart_blocks() -> tuple[tuple[nn.Module, Call], tuple[nn.Module, Call]]:
    model = PixArt(PIXART)
    randomise(model)
    reference = PixArtTransformer2DModel(
        **shape_of(PIXART),
        cross_attention_dim=PIXART.width,
        caption_channels=PIXART.caption_channels,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    reference.load_state_dict(export_weights(model, pixart_diffusers_layout(PIXART)))
    condition, text = draw(BATCH, 6, PIXART.width, seed=1), draw(BATCH, NUM_TEXT, PIXART.width, seed=2)
    is_real = torch.arange(NUM_TEXT) < torch.tensor([5, 2, 1])[:, None]  # [B, L]
    mask = torch.where(is_real, 0.0, -torch.inf)
    packed = pack_text(text, is_real)
    packing = pack(packed.offsets, num_tokens=8, max_length=NUM_TEXT, has_equal_lengths=False, query=text)
    ours, theirs = model.blocks[0], reference.transformer_blocks[0]
    return (
        (ours, lambda x: ours(x, condition, text=packed.values, packing=packing, grid=GRID)),
        (
            theirs,
            lambda x: theirs(
                x,
                encoder_hidden_states=text,
                encoder_attention_mask=mask[:, None],
                timestep=condition.flatten(1),
            ),
        ),
    )


def dit_blocks() -> tuple[tuple[nn.Module, Call], tuple[nn.Module, Call]]:
    model = DiT(DIT)
    randomise(model)
    reference = DiTTransformer2DModel(**shape_of(DIT), num_embeds_ada_norm=DIT.num_classes, norm_eps=1e-6)
    weights = export_weights(model, dit_diffusers_layout(DIT))
    weights |= {copy: weights[first] for copy, first in dit_diffusers_copies(DIT).items()}
    reference.load_state_dict(weights)
    condition = draw(BATCH, DIT.width, seed=1)
    ours, theirs = model.blocks[0], reference.transformer_blocks[0]
    theirs.norm1.emb = Given(condition)
    return (
        (ours, lambda x: ours(x, nn.functional.silu(condition), grid=GRID)),
        (theirs, lambda x: theirs(x)),
    )


def measured(block: nn.Module, call: Call) -> tuple[list[Tensor], Traffic, Traffic]:
    """Output and gradients of a block, and its traffic forward and backward."""
    x, weights = (draw(BATCH, NUM_TOKENS, PIXART.width, seed=seed) for seed in (3, 4))
    with Traffic() as forward:
        output = call(x)
    gradient_of_output = weights.detach() / output.numel() ** 0.5
    leaves = [x, *block.parameters()]
    with Traffic() as backward:
        output.backward(gradient_of_output)
    return [output, *(leaf.grad for leaf in leaves)], forward, backward


@pytest.mark.parametrize("blocks", [pixart_blocks, dit_blocks], ids=["pixart", "dit"])
def test_a_block_moves_no_more_than_diffusers_and_gives_the_same(blocks):
    ours, theirs = (measured(*side) for side in blocks())
    for found, expected in zip(ours[0][:2], theirs[0][:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for which, our_traffic, their_traffic in zip(("forward", "backward"), ours[1:], theirs[1:], strict=True):
        assert 0 < our_traffic.num_bytes <= their_traffic.num_bytes, which
        assert not our_traffic.broadcast_ternary
        # Queries, keys and values are views that attention takes as they are, and what it gives is one, too.
        assert not COPIES & our_traffic.counts.keys(), which


def test_the_count_sees_a_copy_and_a_broadcast_ternary_kernel():
    x, gate = draw(2, 3, 8, seed=0).detach(), draw(2, 1, 8, seed=1).detach()
    with Traffic() as traffic:
        x.transpose(1, 2)
        torch.mm(x[0].T, x[0])
    assert traffic.num_bytes == 0
    with Traffic() as traffic:
        x.transpose(1, 2).contiguous()
    assert traffic.num_bytes == 2 * x.nbytes and COPIES & traffic.counts.keys()
    with Traffic() as traffic:
        torch.addcmul(x, gate, x)
    assert traffic.broadcast_ternary == ["addcmul.default"]
    assert traffic.num_bytes == 3 * x.nbytes + gate.nbytes


@pytest.mark.parametrize("config", [PIXART, DIT], ids=["pixart", "dit"])
def test_tokens_lie_row_by_row_in_memory(config):
    """Else each norm would copy them first, unseen by who counts operations."""
    model = PixArt(config) if isinstance(config, PixArtConfig) else DiT(config)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].is_contiguous()))
    last = torch.randn(BATCH, 20 if isinstance(config, PixArtConfig) else 1, 20)
    condition = (last,) if isinstance(config, PixArtConfig) else (torch.arange(BATCH),)
    model(torch.randn(BATCH, 4, 8, 12), torch.arange(BATCH), *condition)
    assert seen == [True]

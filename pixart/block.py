"""A block of PixArt (PixArt-alpha, section 2.3)."""

# B batch, N image tokens, T tokens of all texts, D width

from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

from pixart.attention import Packing
from pixart.layers import MLP, AdaLNSingle, CrossAttention, KeyValue, SelfAttention, modulate


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention over the text, MLP; modulated by adaLN-single or by an adaLN of its own."""

    def __init__(self, width: int, num_heads: int, *, adaln: str, is_compressed: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads, is_compressed=is_compressed)
        self.cross_attention = CrossAttention(width, num_heads)
        self.mlp = MLP(width, 4 * width, width)
        self.modulation = AdaLNSingle(width, 6) if adaln == "single" else nn.Linear(width, 6 * width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        text: Tensor | KeyValue,
        packing: Packing,
        grid: tuple[int, int],
    ) -> Tensor:
        """Give [B, N, D] from x [B, N, D], rows of `grid` (height, width) tokens one after the other.

        The condition is S [B, 6, D] with adaLN-single, and SiLU(condition) [B, D] with the block's own adaLN. The
        texts lie as `packing` says: [T, D], or what `cross_attention.read` gives of that.
        """
        key_value = self.cross_attention.read(text, packing) if isinstance(text, Tensor) else text
        shifts_scales_gates = self.modulation(condition).view(len(x), 6, -1).chunk(6, dim=1)  # six [B, 1, D]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = shifts_scales_gates
        x = x + gate_attention * self.attention(modulate(x, shift_attention, scale_attention), grid)
        x = x + self.cross_attention(x, key_value, packing)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


@runtime_checkable
class ListsBlocks(Protocol):
    """A network of another make than a transformer, which says itself what its blocks are."""

    def list_blocks(self) -> list[nn.Module]:
        """Return the blocks."""
        ...


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network, and their copies in its control branch if it has one; or those that it lists."""
    if isinstance(network, ListsBlocks):
        return network.list_blocks()
    blocks = list(network.get_submodule("blocks").children())
    branch = cast("nn.Module | None", getattr(network, "control", None))
    return blocks if branch is None else [*blocks, *branch.get_submodule("copies").children()]

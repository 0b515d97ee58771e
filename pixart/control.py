"""The control branch beside a PixArt: an image leads what is drawn (ControlNet-Transformer, PixArt-delta, section 4).

The network stays as it is. Copies of its first blocks, which train, see the control image, and what each of them says
is added to the tokens before the network's next block by a linear layer that begins at zero: so at first nothing
changes. The control image goes through the network's own VAE and patch embedding.
"""

# B batch, N image tokens, D width, C latent channels, h x w latent size

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from pixart.attention import Packing
from pixart.block import PixArtBlock
from pixart.layers import KeyValue


class Control(NamedTuple):
    """What leads a pass: latents [B, C, h, w] of control images as the network knows latents, and how strongly.

    What the branch adds is multiplied by `strength`: 0 is the network alone, 1 is as it was trained.
    """

    latents: Tensor
    strength: float = 1.0


class ControlBranch(nn.Module):
    """Copies of a network's first blocks, a linear layer before the first of them and one after each.

    They come with random weights; `pixart.branching.add_branch` gives them the network's.
    """

    def __init__(
        self, num_copies: int, width: int, *, num_heads: int, adaln: str, compressed_blocks: Collection[int]
    ) -> None:
        """Take the number of copies, and what the blocks of the network are like."""
        super().__init__()
        self.before = _zero_linear(width)
        self.copies = nn.ModuleList(
            PixArtBlock(width, num_heads, adaln=adaln, is_compressed=number in compressed_blocks)
            for number in range(num_copies)
        )
        self.after = nn.ModuleList(_zero_linear(width) for _ in range(num_copies))


class ControlPass:
    """A control branch's part of one pass of its network."""

    def __init__(
        self,
        branch: ControlBranch,
        tokens: Tensor,
        *,
        strength: float,
        condition: Tensor,
        texts: Sequence[Tensor | KeyValue],
        packing: Packing,
        grid: tuple[int, int],
    ) -> None:
        """Take the control image's `tokens` [B, N, D]; all else is as blocks take it, a text for each copy."""
        self._branch = branch
        self._tokens = tokens
        self._strength = strength
        self._condition = condition
        self._texts = texts
        self._packing = packing
        self._grid = grid

    def before(self, number: int, x: Tensor) -> Tensor:
        """Give the tokens x [B, N, D] as the network's block of this number reads them; asked for in their order."""
        branch = self._branch
        if not 0 < number <= len(branch.copies):
            return x
        if number == 1:
            self._tokens = x + branch.before(self._tokens)
        self._tokens = branch.copies[number - 1](
            self._tokens,
            self._condition,
            text=self._texts[number - 1],
            packing=self._packing,
            grid=self._grid,
        )
        return x + self._strength * branch.after[number - 1](self._tokens)


def _zero_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

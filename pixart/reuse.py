"""Reuse of what blocks add to the tokens, from one pass of a network for those after it.

From one step of a solver to the next the inner blocks of a diffusion transformer change little: a pass may compute the
first ones alone, and take for the others what they added when all were computed last (Delta-DiT, Chen et al. 2024).
"""

# B batch, N image tokens, D width

from collections.abc import Collection

import torch
from torch import Tensor

# Computed at every pass: they see the noise that the step has left.
NUM_FIRST_BLOCKS = 1


class BlockRecord:
    """The tokens [B, N, D] behind some blocks, by their numbers, of the last pass of a network."""

    def __init__(self, numbers: Collection[int]) -> None:
        self._numbers = frozenset(numbers)
        self.tokens: dict[int, Tensor] = {}

    def skips(self, number: int) -> bool:
        """Whether the block of this number is left out: none is."""
        return False

    def after(self, number: int, x: Tensor) -> Tensor:
        """Give the tokens x behind the block of this number as they are."""
        if number in self._numbers:
            self.tokens[number] = x
        return x


class BlockReuse:
    """What the blocks after the first added to the tokens in the last pass that computed them all.

    A pass of fewer than `num_rows` rows is one of the last rows: so is guidance without its null half.

    Attributes:
        is_fresh: whether the pass that comes computes all blocks.
    """

    def __init__(self, *, num_blocks: int, num_rows: int) -> None:
        self.is_fresh = True
        self._last = num_blocks - 1
        self._num_rows = num_rows
        self._start: Tensor | None = None  # [B, N, D] behind the first blocks
        # [num_rows, N, D]; it stays where it is in memory, as passes captured in CUDA graphs write and read there
        self._added: Tensor | None = None

    def skips(self, number: int) -> bool:
        """Whether the block of this number is left out of the pass."""
        return not self.is_fresh and number >= NUM_FIRST_BLOCKS

    def after(self, number: int, x: Tensor) -> Tensor:
        """Give the tokens x [B, N, D] behind the block of this number, computed or left out, as they go on."""
        if number == NUM_FIRST_BLOCKS - 1:
            if not self.is_fresh:
                assert self._added is not None
                return x + self._added[-len(x) :]
            self._start = x
        if self.is_fresh and number == self._last:
            self._keep(x)
        return x

    def _keep(self, x: Tensor) -> None:
        assert self._start is not None
        if self._added is None:
            self._added = x.new_empty(self._num_rows, *x.shape[1:])
        torch.sub(x, self._start, out=self._added[-len(x) :])
        self._start = None

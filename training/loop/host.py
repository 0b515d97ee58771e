"""What a GPU leaves in the machine's memory (`training.offload`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errors import UserError
from training.config import StageTraining

if TYPE_CHECKING:
    from torch import Tensor


def require_offload(settings: StageTraining, *, num_ranks: int) -> None:
    """Refuse to step an optimizer on the CPU that is not a rank's own, or whose masters are the weights.

    Raises:
        UserError: names what it does not go with.
    """
    if settings.offload != "optimizer":
        return
    for name, value, wanted in (
        ("ranks", num_ranks, 1),
        ("training.zero_stage", settings.zero_stage, 0),
        ("training.dtype", settings.dtype, "bf16"),
    ):
        if value != wanted:
            raise UserError(
                f"training.offload = 'optimizer' is for one rank in bf16 under ZeRO 0, and {name} = {value!r}: several "
                "ranks share an optimizer by training.zero_stage; change it, or training.offload to 'average'"
            )


def in_host_memory(tensor: Tensor) -> Tensor:
    """Return a copy in the machine's memory, pinned so that a GPU reads it by itself."""
    import torch  # a plan, which asks what goes with what, needs none

    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)

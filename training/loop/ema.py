"""The exponential moving average of the fp32 master weights, each rank over its own shard."""

import torch
from torch import Tensor, nn

from training.loop.host import in_host_memory
from training.loop.sizes import TAKEN_AT_ONCE
from training.loop.zero import ZeroModel
from training.stages.critics import PREFIX as CRITICS
from training.stages.critics import critic_of


class EMA:
    """Average of a model's masters; starts as a copy of them, and lies where `training.offload` says.

    `decay` is that of the updates to come.
    """

    def __init__(self, model: ZeroModel, decay: float) -> None:
        self._model = model
        self.decay = decay
        take = torch.clone if model.settings.offload == "nothing" else in_host_memory
        self.shards = [take(master.detach()) for master in model.masters]

    @torch.no_grad()
    def update(self, *, is_skipped: Tensor) -> None:
        """Move the average towards the masters: ema = decay * ema + (1 - decay) * master.

        Where the scalar `is_skipped` on the device says so it stays where it is.
        """
        masters = [master.detach() for master in self._model.masters]
        if self._model.settings.offload != "average":
            self._move(self.shards, masters, is_skipped=is_skipped)
            return
        for shard, master in zip(self.shards, masters, strict=True):
            pairs = zip(*(each.view(-1).split(TAKEN_AT_ONCE) for each in (shard, master)), strict=True)
            for kept, piece in pairs:
                # Behind each other on the device's stream; the host goes on.
                average = kept.to(piece.device, non_blocking=True)
                self._move([average], [piece], is_skipped=is_skipped)
                kept.copy_(average, non_blocking=True)

    def _move(self, averages: list[Tensor], masters: list[Tensor], *, is_skipped: Tensor) -> None:
        # The one kernel of torch that does it in one pass and asks the device whether to: plain SGD at the rate
        # 1 - decay along ema - master, of which "weight decay" gives the first part and "maximize" the second.
        torch.ops.aten._fused_sgd_.default(
            averages,
            masters,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=1 - self.decay,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            grad_scale=None,
            found_inf=is_skipped.float().to(averages[0].device),
        )

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        """Return the whole average by weight name, fp32 on the CPU; all ranks must call it, and only rank 0 gets it."""
        with self._model.masters_as(self.shards):
            return self._model.gather_masters()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Set the average from whole weights by name, as `gather` gave them, at any world size.

        That of a critic, which is not among them and which nobody asks for, stays as it is.
        """
        with self._model.masters_as(self.shards):
            # Gathering them asks all ranks, of which one may have found its file damaged.
            has_critic = critic_of(self._model.engine.module) is not None
            masters = self._model.whole_masters() if has_critic else []
            critics = {
                name: weight.detach().to("cpu", copy=True) for name, weight in masters if name.startswith(CRITICS)
            }
            self._model.scatter_masters(weights | critics)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Set the trained weights of a network of the same shape to the average; all ranks must call it."""
        with self._model.masters_as(self.shards):
            for name, weight in self._model.whole_masters():
                if not name.startswith(CRITICS):
                    network.get_parameter(name).copy_(weight)

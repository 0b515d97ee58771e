"""The exponential moving average of the fp32 master weights, each rank over its own shard."""

import torch
from torch import Tensor, nn

from training.loop.zero import ZeroModel


class EMA:
    """Average of a model's masters; starts as a copy of them."""

    def __init__(self, model: ZeroModel, decay: float) -> None:
        self._model = model
        self._decay = decay
        self.shards = [master.detach().clone() for master in model.masters]

    @torch.no_grad()
    def update(self, *, is_skipped: Tensor) -> None:
        """Move the average towards the masters: ema = decay * ema + (1 - decay) * master.

        Where the scalar `is_skipped` on the device says so it stays where it is.
        """
        # The one kernel of torch that does it in one pass and asks the device whether to: plain SGD at the rate
        # 1 - decay along ema - master, of which "weight decay" gives the first part and "maximize" the second.
        torch.ops.aten._fused_sgd_.default(
            self.shards,
            [master.detach() for master in self._model.masters],
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=1 - self._decay,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            grad_scale=None,
            found_inf=is_skipped.float(),
        )

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        """Return the whole average by weight name, fp32 on the CPU; all ranks must call it, and only rank 0 gets it."""
        with self._model.masters_as(self.shards):
            return self._model.gather_masters()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Set the average from whole weights by name, as `gather` gave them, at any world size."""
        with self._model.masters_as(self.shards):
            self._model.scatter_masters(weights)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Set the trained weights of a network of the same shape to the average; all ranks must call it."""
        with self._model.masters_as(self.shards):
            for name, weight in self._model.whole_masters():
                network.get_parameter(name).copy_(weight)

"""The networks of an objective while a stage trains: one under DeepSpeed with its average, the others as they are."""

from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor, nn

from training.loop.averages import Averages
from training.loop.conversions import needs_universal
from training.loop.ema import EMA
from training.loop.state import load_checkpoint
from training.loop.zero import Update, ZeroModel
from training.objectives.objective import Average, Role, Trained
from training.stages.kinds import Network
from training.stages.stage import TrainingJob


class Networks(Mapping[str, nn.Module]):
    """Networks by the names their objective has for them.

    An average is brought up to date when it is asked for, once after each update; all ranks must ask.
    """

    def __init__(
        self, roles: Mapping[str, Role], *, model: ZeroModel, averages: Averages, others: Mapping[str, nn.Module]
    ) -> None:
        """Take the trained network as `model` and its `averages`, and `others` of `roles` by name, on the device."""
        self.model = model
        self.averages = averages
        self._roles = roles
        self._others = others
        self._stale = {name for name, role in roles.items() if isinstance(role, Average)}

    def __getitem__(self, name: str) -> nn.Module:
        if name in self._stale:
            self.ema.copy_to(self._others[name])
            self._stale.remove(name)
        return self.model.engine if isinstance(self._roles[name], Trained) else self._others[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    @property
    def ema(self) -> EMA:
        """The average that is exported."""
        return self.averages.exported

    def update(self, learning_rate: float, *, step: int, is_ruined: Tensor) -> Update:
        """Step the optimizer and move the average, unless the gradient is not finite or `is_ruined` on the device.

        `step` is counted from 0.
        """
        update = self.model.update(learning_rate, is_ruined=is_ruined)
        self.averages.update(step, is_skipped=update.is_skipped)
        self._stale = {name for name, role in self._roles.items() if isinstance(role, Average)}
        return update


def open_networks(job: TrainingJob, roles: Mapping[str, Role], started: Mapping[str, Network]) -> Networks:
    """Return the networks of an objective on the device, as they `started` or as the checkpoint to resume has them."""
    resume = job.resume
    (trained,) = (network for name, network in started.items() if isinstance(roles[name], Trained))
    is_elastic = resume is not None and needs_universal(resume, dist.get_world_size())
    model = ZeroModel(trained, job.settings, loads_universal=is_elastic)
    averages = Averages(model)
    others = {name: network for name, network in started.items() if network is not trained}
    for network in others.values():
        network.to(model.device, model.dtype).eval()
    if resume is not None:
        load_checkpoint(resume, model=model, ema=averages.exported, second=averages.second)
    return Networks(roles, model=model, averages=averages, others=others)

"""The networks of an objective while a stage trains: one under DeepSpeed with its average, the others as they are."""

from collections.abc import Iterator, Mapping

from torch import nn

from training.loop.ema import EMA
from training.loop.zero import Update, ZeroModel
from training.objectives.objective import Average, Role


class Networks(Mapping[str, nn.Module]):
    """Networks by the names their objective has for them.

    An average is brought up to date when it is asked for, once after each update; all ranks must ask.
    """

    def __init__(
        self, roles: Mapping[str, Role], *, model: ZeroModel, ema: EMA, others: Mapping[str, nn.Module]
    ) -> None:
        """Take the trained network as `model` and `ema`, and `others` of `roles` by name, on the device."""
        self.model = model
        self.ema = ema
        self._roles = roles
        self._others = others
        self._stale = {name for name, role in roles.items() if isinstance(role, Average)}

    def __getitem__(self, name: str) -> nn.Module:
        if name in self._stale:
            self.ema.copy_to(self._others[name])
            self._stale.remove(name)
        return self._others.get(name, self.model.engine)

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def update(self, learning_rate: float) -> Update:
        """Step the optimizer and move the average, unless the gradient is not finite."""
        update = self.model.update(learning_rate)
        if not update.is_skipped:
            self.ema.update()
            self._stale = {name for name, role in self._roles.items() if isinstance(role, Average)}
        return update

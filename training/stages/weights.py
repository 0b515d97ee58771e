"""How many weights a stage has, by what is kept of each."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WeightCounts:
    """Weights that train, those of the same network that do not, and those of networks that run forward beside it.

    Each is counted once: `shared` are those of frozen networks that were loaded to be found among the others. Of those
    that train `critic` are a critic's, which nothing exports.
    """

    trained: int
    frozen: int = 0
    beside: int = 0
    shared: int = 0
    critic: int = 0

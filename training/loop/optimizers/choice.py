"""The optimizer that a recipe names; here alone optimizers are known by name."""

from training.config import StageTraining
from training.loop.optimizers.adamw import TorchAdamW
from training.loop.optimizers.adamw8bit import BlockAdamW
from training.loop.optimizers.muon import MuonOfBlocks
from training.loop.optimizers.rule import Rule


def choose_rule(settings: StageTraining) -> Rule:
    """Return the rule of a stage's optimizer."""
    match settings.optimizer:
        case "adamw":
            return TorchAdamW()
        case "adamw8bit":
            return BlockAdamW()
        case "muon":
            return MuonOfBlocks()

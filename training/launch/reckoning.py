"""What a rank's memory holds while a stage trains, by what it is for; nothing here needs torch.

The figures are those of storages that live at a time, as a dispatch mode counts them in tests/test_training_budget.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from training.config import KeepActivations, StageTraining
from training.loop.sizes import (
    MAX_EXCHANGED,
    MAX_GATHERED,
    ORTHOGONALIZED_BYTES,
    PIECE_SIZE,
    STEPPED_BYTES,
    TAKEN_AT_ONCE,
)
from training.stages.weights import WeightCounts

MAX_ZERO_STAGE = 3
FP32 = 4
# Of an optimizer's moments, a weight's share; of those in 8 bits a scale goes with each 256, and of
# matrices of blocks, 97% of XL/2, muon keeps one moment.
MOMENT_BYTES = {"adamw": 2 * FP32, "adamw8bit": 2 * (1 + FP32 / 256), "muon": FP32}
# Of gradients in a backward pass: they are there before it and added to, come as activations go, or come and go.
GradientsIn = Literal["there", "coming", "passing"]


def rank_parts(
    settings: StageTraining, weights: WeightCounts, *, num_ranks: int, num_micro_batches: int, is_host: bool = False
) -> dict[str, int]:
    """Return the bytes of what stays on one rank from step to step, by what it is, as ZeRO shards it.

    The optimizer's part is the two moments, and a master copy unless the network itself is that. `is_host` is of the
    machine's memory, in which a CPU trains and a GPU leaves what `training.offload` says.
    """
    stage, width = settings.zero_stage, _width(settings)
    computed = width / (num_ranks if stage >= 3 else 1)
    gradients = width / num_ranks if stage >= 2 else width
    if _sums_in_fp32(settings, num_micro_batches):
        gradients = FP32 / num_ranks
    shards, state = num_ranks if stage >= 1 else 1, MOMENT_BYTES[settings.optimizer] + FP32 * _has_masters(settings)
    whole = weights.trained + weights.frozen
    leaves_optimizer = settings.offload == "optimizer" and not is_host
    leaves_average = settings.offload != "nothing" and not is_host
    return {
        "weights": int(whole * computed + weights.beside * width),
        "gradients": 0 if leaves_optimizer else int(weights.trained * gradients),
        "optimizer": 0 if leaves_optimizer else int(weights.trained * state / shards),
        "average": 0 if leaves_average else int(settings.num_averages * weights.trained * FP32 / shards),
    }


def rank_bytes(settings: StageTraining, weights: WeightCounts, *, num_ranks: int) -> int:
    """Return the bytes of weights, gradients, optimizer and average on one rank, as ZeRO shards them."""
    parts = rank_parts(settings, weights, num_ranks=num_ranks, num_micro_batches=settings.num_micro_batches)
    return sum(parts.values())


def _width(settings: StageTraining) -> int:
    return 2 if settings.dtype == "bf16" else FP32


def _has_masters(settings: StageTraining) -> bool:
    return settings.zero_stage > 0 or settings.dtype == "bf16"


def _sums_in_fp32(settings: StageTraining, num_micro_batches: int) -> bool:
    return (settings.zero_stage >= 2 or settings.offload == "optimizer") and num_micro_batches > 1


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a stage asks of a rank's memory.

    Attributes:
        num_ranks: that share each batch.
        sample_tokens: image tokens of the largest sample.
        step_bytes: of a micro-batch of so many samples, what it takes under `keep_activations` beside weights and the
            gradients that are there; of those that come, it has them.
        batch_bytes: of a micro-batch itself, with those that lie ready.
        is_host: whether it is the machine's memory, where the networks of the start lie, too.
    """

    settings: StageTraining
    weights: WeightCounts
    num_ranks: int
    sample_tokens: int
    step_bytes: Callable[[int, KeepActivations, GradientsIn], int]
    batch_bytes: Callable[[int], int]
    is_host: bool = False

    def between_steps(self) -> dict[str, int]:
        """Return the bytes of what is there between two steps, when gradients are gone."""
        parts = self._staying(1)
        return {name: size for name, size in parts.items() if name != "gradients"}

    @property
    def share(self) -> int:
        """Samples of a batch that are a rank's."""
        return self.settings.global_batch_size // self.num_ranks

    def parts(self, num_micro_batches: int, kept: KeepActivations) -> dict[str, int]:
        """Return the bytes of a rank at its fullest, by what they are for."""
        stays = self._staying(num_micro_batches)
        batches = self.batch_bytes(self.share // num_micro_batches)
        moments = [
            self.opening(stays["weights"]),
            {**stays, "batches": batches, **self._passing(stays["gradients"], num_micro_batches, kept)},
            {**stays, "batches": batches, "exchange": self._shared()},
            {**stays, "optimizer's step": self._stepping(num_micro_batches)},
        ]
        fullest = max(moments, key=lambda parts: sum(parts.values()))
        return {name: size for name, size in fullest.items() if size}

    def _staying(self, num_micro_batches: int) -> dict[str, int]:
        stays = rank_parts(
            self.settings,
            self.weights,
            num_ranks=self.num_ranks,
            num_micro_batches=num_micro_batches,
            is_host=self.is_host,
        )
        if self.is_host and self.settings.trains != "lora":
            stays["frozen weights in fp32"] = self.weights.frozen * FP32
        return stays

    def opening(self, computed: int) -> dict[str, int]:
        """Return what is there while DeepSpeed makes masters, and gradients that it throws away.

        `computed` are the bytes of the weights that the network computes with.
        """
        settings, weights = self.settings, self.weights
        shards = self.num_ranks if settings.zero_stage >= 1 else 1
        made = 2 * FP32 * weights.trained // shards if _has_masters(settings) else 0
        if settings.zero_stage == 0 and settings.dtype == "bf16":
            made += _width(settings) * weights.trained
        if not self.is_host:
            return {"weights": computed, "made at the start": made}
        whole = {"loaded": (weights.trained + weights.frozen + weights.beside + weights.shared) * FP32}
        # What adapters are beside was loaded in fp32, and is itself what the network computes with now.
        others = weights.beside + (0 if settings.trains == "lora" else weights.frozen)
        loaded = (weights.trained + others) * FP32 * (made > 0)
        opened = {"weights": computed, "made at the start": made, "loaded": loaded}
        return max(whole, opened, key=lambda parts: sum(parts.values()))

    def _passing(self, gradients: int, num_micro_batches: int, kept: KeepActivations) -> dict[str, int]:
        """Return what the forward and the backward pass of a micro-batch take beside what stays."""
        stage, is_once, is_alone = self.settings.zero_stage, num_micro_batches == 1, self.num_ranks == 1
        size = self.share // num_micro_batches
        if self.settings.offload == "optimizer" and not (self.is_host and is_once):
            return {"activations": self.step_bytes(size, kept, "passing")}
        if (stage == 0 and is_once) or (stage in (1, 2) and is_alone and is_once):
            return {"activations": self.step_bytes(size, kept, "coming") - gradients}
        if stage == 0:
            return {"activations": self.step_bytes(size, kept, "there")}
        if stage == MAX_ZERO_STAGE:
            return {"activations": self.step_bytes(size, kept, "there"), "exchange": self._bucket() + self._gathered()}
        if is_alone:
            is_summed = _sums_in_fp32(self.settings, num_micro_batches)
            return {"activations": self.step_bytes(size, kept, "coming" if is_summed else "there")}
        # Gradients of a single micro-batch lie in the bucket alone, until ranks have shared them.
        kept_back = {"gradients": 0} if is_once else {}
        return {"activations": self.step_bytes(size, kept, "there"), "exchange": self._bucket(), **kept_back}

    def _bucket(self) -> int:
        return min(self.weights.trained, MAX_EXCHANGED) * _width(self.settings)

    def _gathered(self) -> int:
        return min(self.weights.trained + self.weights.frozen, MAX_GATHERED) * _width(self.settings)

    def _shared(self) -> int:
        """Return what ranks share gradients through, when activations are gone."""
        bucket, is_alone = self._bucket(), self.num_ranks == 1
        if self.settings.zero_stage < MAX_ZERO_STAGE:
            return 0 if is_alone else bucket
        # The bucket, a copy of it in shares, and each rank's share in fp32; gloo has a copy more.
        shares = min(self.weights.trained, MAX_EXCHANGED) * FP32 // self.num_ranks
        return self._gathered() + 2 * bucket + (max(shares, bucket) if self.is_host else shares)

    def _stepping(self, num_micro_batches: int) -> int:
        """Return what the optimizer takes: gradients in fp32, if they are not summed in it, and measuring itself."""
        shards = self.num_ranks if self.settings.zero_stage >= 1 else 1
        is_copied = _has_masters(self.settings) and not _sums_in_fp32(self.settings, num_micro_batches)
        trained = self.weights.trained // shards
        if self.settings.offload == "optimizer" and not self.is_host:
            return 0
        piece, width = min(trained, PIECE_SIZE), STEPPED_BYTES[self.settings.optimizer]
        if self.settings.optimizer == "muon":
            piece = min(trained, TAKEN_AT_ONCE)
            if self.settings.zero_stage == 0:
                # Nothing is longer than a weight, so that it is matrices of one shape, half of all, in bf16.
                piece, width = min(trained // 2, TAKEN_AT_ONCE), ORTHOGONALIZED_BYTES
        stepping = trained * FP32 * is_copied + piece * width
        if self.settings.offload == "average" and not self.is_host:
            return max(stepping, min(trained, TAKEN_AT_ONCE) * FP32)
        return stepping

"""How much memory a micro-batch takes beside what stays from step to step: reckoned, or measured on a device.

It is reckoned by running the objective, forward and backward, on tensors that have shapes and no values, so that what
is counted is what the code keeps, of any objective and any part of a network that trains.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from encoders.living_bytes import LivingBytes, fused_attention
from pixart.compilation import compile_blocks
from training.config import KeepActivations, StageTraining
from training.data.batch import Batch
from training.data.blank import SampleShape, blank_batch
from training.launch.reckoning import GradientsIn
from training.loop.compilation import is_compiled
from training.loop.memory import keep_activations
from training.loop.products import choose_products
from training.objectives.objective import Objective, Trained
from training.stages.kinds import Network
from training.stages.networks import blank_copies

META = torch.device("meta")


class Meter(Protocol):
    """Watches memory while it is entered; what was there before does not count."""

    @property
    def peak_bytes(self) -> int:
        """The most that was taken at a time."""
        ...

    def watching(self, *, ignored: list[Tensor]) -> AbstractContextManager[Any]:
        """Watch inside; `ignored` are the tensors that are there already."""
        ...


class CudaBytes:
    """What torch's allocator of a GPU says."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    @property
    def peak_bytes(self) -> int:
        """The most that was taken at a time."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def watching(self, *, ignored: list[Tensor]) -> "CudaBytes":
        """Watch inside; the allocator knows by itself what is there."""
        return self

    def __enter__(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def __exit__(self, *exception: object) -> None:
        torch.cuda.synchronize(self._device)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a stage's steps are made of.

    Attributes:
        objective: gives the objective for a device.
        networks: of the objective, on the meta device; of the one that is trained the same weights train.
        sample: the largest there is.
    """

    settings: StageTraining
    objective: Callable[[torch.device], Objective]
    networks: Mapping[str, Network]
    sample: SampleShape
    dtype: torch.dtype

    def batch_bytes(self, num_samples: int) -> int:
        """Return the bytes of a micro-batch as the objective gets it."""
        batch = blank_batch(self.sample, num_samples, device=torch.device("meta"))
        return sum(tensor.numel() * tensor.element_size() for tensor in batch.device_tensors())

    @property
    def gradient_bytes(self) -> int:
        """The bytes of the gradients of all weights that train."""
        weights = [weight for network in self.networks.values() for weight in network.parameters()]
        return sum(weight.numel() for weight in weights if weight.requires_grad) * self.dtype.itemsize

    def reckon(self, num_samples: int, kept: KeepActivations, *, gradients: GradientsIn = "there") -> int:
        """Return the bytes that a micro-batch takes beside weights, gradients and the batch, by its shapes alone.

        Gradients that are `coming` are not there before and count; those that are `passing` are gone at once.
        """
        with fused_attention():
            return self._run(num_samples, kept, device=META, meter=LivingBytes(), num_warm_ups=0, gradients=gradients)

    def measure(
        self,
        num_samples: int,
        kept: KeepActivations,
        *,
        device: torch.device,
        meter: Meter,
        gradients: GradientsIn = "there",
    ) -> int:
        """Return the same as a device takes it: the blocks as they are trained, compiled and in FP8 where they are."""

        def prepare(network: nn.Module) -> None:
            choose_products(network, self.settings, device=device)
            if is_compiled(self.settings):
                compile_blocks(network)

        # The first runs compile, and choose and load kernels.
        return self._run(
            num_samples, kept, device=device, meter=meter, num_warm_ups=2, gradients=gradients, prepare=prepare
        )

    def _run(
        self,
        num_samples: int,
        kept: KeepActivations,
        *,
        device: torch.device,
        meter: Meter,
        num_warm_ups: int,
        gradients: GradientsIn = "there",
        prepare: Callable[[nn.Module], None] = lambda network: None,
    ) -> int:
        objective = self.objective(device)
        networks = self._blanks(device)
        (trained,) = (network for name, network in networks.items() if isinstance(objective.networks[name], Trained))
        prepare(trained)
        keep_activations(trained, kept)
        if gradients == "there":
            for weight in trained.parameters():
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        # The last step: by then all parts of an objective have begun.
        batch = blank_batch(self.sample, num_samples, device=device, step=self.settings.num_steps - 1)
        for _ in range(num_warm_ups):
            _step(objective, networks, batch)
        weights = [weight for network in networks.values() for weight in network.parameters()]
        if gradients == "passing":
            for weight in trained.parameters():
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        present = [weight.grad for weight in weights if weight.grad is not None]
        with meter.watching(ignored=[*weights, *present, *batch.device_tensors()]):
            _step(objective, networks, batch)
        return meter.peak_bytes

    def _blanks(self, device: torch.device) -> dict[str, Network]:
        """Return the networks with zeros for weights; what is held once for several is so here."""
        blanks = blank_copies(self.networks)
        weights = {id(weight): weight for blank in blanks.values() for weight in blank.parameters()}
        zeros = {key: torch.zeros(weight.shape, dtype=self.dtype, device=device) for key, weight in weights.items()}
        for blank in blanks.values():
            own = {name: zeros[id(weight)] for name, weight in blank.named_parameters()}
            blank.load_state_dict(own, assign=True)
            for name, values in list(blank.named_buffers()):  # that no file holds, such as places
                place, _, last = name.rpartition(".")
                blank.get_submodule(place).register_buffer(last, torch.zeros_like(values, device=device), False)
        return blanks


def _step(objective: Objective, networks: Mapping[str, nn.Module], batch: Batch) -> None:
    objective.loss(networks, batch).minimised.mean().backward()

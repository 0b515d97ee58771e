"""The denoising objective: predict what a process asks for of noisy latents."""

# B batch, C latent channels, h x w latent size

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pixart.processes.process import Process
from pixart.reuse import BlockRecord
from training.data.batch import Batch
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Losses, Role, Trained


@dataclass(frozen=True, kw_only=True)
class Denoise:
    """Predict what a process asks for of noisy latents of a class or a caption.

    Attributes:
        process: what noise does to latents, and the loss.
        inputs: what a network sees of a batch.
    """

    process: Process
    inputs: NetworkInputs

    @property
    def networks(self) -> Mapping[str, Role]:
        """One network, which is trained."""
        return {"network": Trained()}

    @property
    def families(self) -> tuple[str, ...]:
        """Latents and their condition."""
        return self.inputs.families

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Return the process' loss of each sample [B]."""
        return self.loss_of(self.output(networks["network"], batch), batch)

    def output(self, network: nn.Module, batch: Batch, *, record: BlockRecord | None = None) -> Tensor:
        """Return what a network says of the batch's latents with noise [B, C or 2C, h, w].

        `record` takes what is behind some of its blocks.
        """
        times = self.process.times(batch.timestep_draws)
        noisy = self.process.noisy(self.inputs.latents(batch), batch.noise, times)  # [B, C, h, w]
        return self.inputs.output(network, noisy, times, batch=batch, record=record)

    def loss_of(self, output: Tensor, batch: Batch) -> Losses:
        """Return the process' loss of each sample [B], of what `output` gave."""
        times = self.process.times(batch.timestep_draws)
        loss = self.process.loss(output, self.inputs.latents(batch), batch.noise, times)
        return Losses(total=loss.total, parts=loss.parts, times=times.double() / self.process.num_times)

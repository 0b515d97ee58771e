"""The objective of a codec: images come back as they were, by pixels, features and what a discriminator sees.

The loss of LDM and VQGAN (arXiv 2112.10752, 2012.09841) with what an image's part in it depends on cut down to that
image: so losses depend on neither micro-batches nor ranks.
"""

# B batch, C latent channels, H x W pixels, h x w latent size

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.perceptual import perceptual_distance
from training.codec_keys import PERCEPTUAL, ReconstructionSettings
from training.data.batch import PIXEL_TENSOR, Batch
from training.objectives.noises import more_noise
from training.objectives.objective import Frozen, Losses, Role, Trained

# Of gradients and errors that may be nothing.
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Losses between images and what a codec makes of them.

    Attributes:
        settings: weights of the losses.
        dtype: compute precision of the networks.
        seed: decides what is drawn of latents.
    """

    settings: ReconstructionSettings
    dtype: torch.dtype
    seed: int = 0

    @property
    def networks(self) -> Mapping[str, Role]:
        """The codec, and a vision model where its features count."""
        return {"network": Trained(), **({PERCEPTUAL: Frozen()} if self.settings.perceptual_weight else {})}

    @property
    def families(self) -> tuple[str, ...]:
        """Crops of images."""
        return ("pixels",)

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Return the weighted sum [B], and the discriminator's loss once it has begun.

        Where a network is in evaluation, latents are the means and no discriminator is asked. The part `psnr` is in dB
        and minimised by nobody.
        """
        network, images = networks["network"], levels(batch.tensors[PIXEL_TENSOR])
        found = network(images.to(self.dtype), self._noise(network, batch, images))
        decoded, kl = found.images.float(), _divergence(found.mean, found.log_variance)
        # What is said of the decoded image is differentiated at the image itself, and goes on from there: so vision
        # model and discriminator are gone from memory when the codec goes backward, and each image has its own balance.
        leaf = decoded.detach().requires_grad_(torch.is_grad_enabled())
        seen = leaf.view_as(leaf)  # hooks of modules want inputs that something has made
        parts = self._distances(networks, seen, images)
        said, critic = self._weighed(parts), None
        gradient = _gradient(said, leaf)
        if self.settings.has_discriminator and network.training:
            judge = cast("nn.Module", network.critic)  # of whatever wraps it, too
            has_begun = batch.step >= self.settings.discriminator_from_step
            critic, parts["adversarial"] = self._judged(judge, seen, images, has_begun=has_begun)
            parts["discriminator"] = critic
            said = said + self.settings.discriminator_weight * parts["adversarial"]
            if has_begun:
                gradient = gradient + self.settings.discriminator_weight * self._balanced(
                    _gradient(parts["adversarial"], leaf), gradient
                )
        total = said.detach() + self.settings.kl_weight * kl
        # Nothing is added to the value, and to the gradient what the image's is.
        total = total + ((decoded - decoded.detach()) * gradient).flatten(1).sum(1)
        parts |= {"kl": kl, "psnr": _psnr(decoded, images)}
        return Losses(total=total, parts=parts, times=torch.zeros_like(kl, dtype=torch.float64), critic=critic)

    def _noise(self, network: nn.Module, batch: Batch, images: Tensor) -> Tensor:
        """Return noise of latents, fp32 [B, C, h, w]."""
        own: Any = network  # whatever wraps a network says what the network says of itself
        shape = own.latent_shape(images.shape)
        if not network.training:
            return images.new_zeros(shape)
        return more_noise(batch, "latents", seed=self.seed, like=images.new_empty(shape))

    def _distances(self, networks: Mapping[str, nn.Module], decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Return what lies between images [B] each."""
        error = decoded - images
        parts = {"mse": _mean(error.square()), "l1": _mean(error.abs())}
        if self.settings.perceptual_weight:
            parts["perceptual"] = perceptual_distance(networks[PERCEPTUAL], decoded, images)
        return parts

    def _weighed(self, parts: Mapping[str, Tensor]) -> Tensor:
        weights = {name: getattr(self.settings, f"{name}_weight") for name in parts}
        return torch.stack([weights[name] * parts[name] for name in parts]).sum(0)

    def _judged(self, critic: nn.Module, decoded: Tensor, images: Tensor, *, has_begun: bool) -> tuple[Tensor, Tensor]:
        """Return the discriminator's own loss [B], and how fake it finds the decoded images [B]; zeros until it begins.

        Every weight has a gradient in each step all the same, as what shares gradients out waits for all of them.
        """
        if not has_begun:
            nothing = 0.0 * critic(images[:1].to(self.dtype)).mean()
            return nothing.expand(len(images)), images.new_zeros(len(images))
        real, fake = critic(images.to(self.dtype)), critic(decoded.detach().to(self.dtype))
        hinge = 0.5 * (_mean(F.relu(1.0 - real)) + _mean(F.relu(1.0 + fake)))
        return hinge, -_mean(critic(decoded.to(self.dtype)))

    def _balanced(self, gradient: Tensor, other: Tensor) -> Tensor:
        """Return the discriminator's gradient at each image, as large as that of the `other` losses."""
        if not self.settings.is_balanced:
            return gradient
        norm, wanted = (each.flatten(1).norm(dim=1)[:, None, None, None] for each in (gradient, other))
        return gradient * (wanted / (norm + TINY))


def _gradient(losses: Tensor, images: Tensor) -> Tensor:
    """Return the gradient at images [B, 3, H, W] of losses [B], each of its own image alone; zero if none is asked."""
    if not images.requires_grad:
        return torch.zeros_like(images)
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    return gradient


def levels(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as networks read them, fp32 in -1 to 1."""
    return pixels.float() / 127.5 - 1.0


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def _divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the divergence of latents from a normal distribution, the mean over an image's values [B]."""
    return 0.5 * _mean(mean.square() + log_variance.exp() - 1.0 - log_variance)


def _psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB [B] of images in -1 to 1."""
    error = _mean(((decoded.detach().clamp(-1, 1) - images) / 2).square())
    return -10.0 * (error + TINY).log10()

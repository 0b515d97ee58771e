"""The objective of a codec: its gradient against plain autograd, each image by itself, and frozen features."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tiny_encoders import save_deep_codec
from torch import Tensor, nn
from transformers import CLIPVisionModel

from encoders.opening import open_codec
from encoders.perceptual import open_perceptual, perceptual_distance
from encoders.weights import resolve_model
from errors import UserError
from toyworld.judge import WEIGHTS as JUDGE_WEIGHTS
from training.codec.autoencoder import Autoencoder, config_of_shape
from training.codec.discriminator import PatchDiscriminator
from training.codec.files import load_codec, read_codec_config
from training.codec_keys import CodecShape, ReconstructionSettings
from training.data.batch import Batch
from training.data.blank import SampleShape, blank_batch
from training.objectives.noises import more_noise
from training.objectives.objective import Losses
from training.objectives.reconstruction import Reconstruct, levels

WEIGHTS = JUDGE_WEIGHTS.parent
SHAPE = CodecShape(block_channels=[8, 16], layers_per_block=1, latent_channels=3, norm_groups=2, middle_attention=False)
SETTINGS = ReconstructionSettings(
    mse_weight=0.7, l1_weight=0.3, kl_weight=0.01, discriminator_weight=0.5, discriminator_from_step=10
)


def batch_of(size: int, *, step: int, seed: int = 0) -> Batch:
    shape = SampleShape(channels=3, height=32, width=40, num_text_tokens=0, text_width=None, is_pixels=True)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 3, 32, 40), dtype=torch.uint8, generator=generator)
    batch = blank_batch(shape, size, device=torch.device("cpu"), step=step)
    return replace(batch, tensors={"pixels.pixels": pixels}, keys=[f"key{i}" for i in range(size)])


@pytest.fixture
def network() -> Autoencoder:
    torch.manual_seed(0)
    made = Autoencoder(config_of_shape(SHAPE, sample_size=32))
    made.critic = PatchDiscriminator(8)
    return made.double()


def objective(**changed: object) -> Reconstruct:
    return Reconstruct(settings=SETTINGS.model_copy(update=changed), dtype=torch.float64, seed=3)


def gradients(network: nn.Module, losses: Losses) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    losses.minimised.mean().backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


def test_the_gradient_is_that_of_the_weighted_sum_and_the_critic_learns_by_its_own_loss(network: Autoencoder) -> None:
    batch = batch_of(3, step=10)
    losses = objective(is_balanced=False).loss({"network": network}, batch)
    found = gradients(network, losses)
    images = levels(batch.tensors["pixels.pixels"]).double()
    noise = more_noise(batch, "latents", seed=3, like=torch.empty(network.latent_shape(images.shape)))
    made = network(images, noise)
    error = (made.images.float() - images.float()).double()
    kl = 0.5 * (made.mean.square() + made.log_variance.exp() - 1 - made.log_variance).mean((1, 2, 3))
    total = 0.7 * error.square().mean((1, 2, 3)) + 0.3 * error.abs().mean((1, 2, 3)) + 0.01 * kl
    critic = network.critic
    assert isinstance(critic, nn.Module)
    fooled = -critic(made.images).mean((1, 2))
    hinge = (1 - critic(images)).relu().mean((1, 2)) + (1 + critic(made.images.detach())).relu().mean((1, 2))
    torch.testing.assert_close(losses.total.double(), total + 0.5 * fooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.parts["discriminator"].double(), 0.5 * hinge.double(), atol=1e-5, rtol=1e-5)
    own = [weight for name, weight in network.named_parameters() if not name.startswith("critic.")]
    expected = torch.autograd.grad((total + 0.5 * fooled).mean(), own, retain_graph=True)
    of_critic = torch.autograd.grad(0.5 * hinge.mean(), list(critic.parameters()))
    names = [name for name, _ in network.named_parameters()]
    wanted = dict(zip([n for n in names if not n.startswith("critic.")], expected, strict=True))
    wanted |= dict(zip([n for n in names if n.startswith("critic.")], of_critic, strict=True))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_no_image_changes_what_another_says(network: Autoencoder) -> None:
    whole = batch_of(4, step=12)
    together = gradients(network, objective().loss({"network": network}, whole))
    alone = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for i in range(4):
        single = replace(
            batch_of(1, step=12),
            tensors={"pixels.pixels": whole.tensors["pixels.pixels"][i : i + 1]},
            keys=[whole.keys[i]],
        )
        for name, gradient in gradients(network, objective().loss({"network": network}, single)).items():
            alone[name] += gradient / 4
    for name, gradient in together.items():
        torch.testing.assert_close(alone[name], gradient, atol=1e-7, rtol=1e-4, msg=name)


def test_before_its_step_a_discriminator_moves_nothing_and_is_not_moved(network: Autoencoder) -> None:
    batch = batch_of(2, step=9)
    found = gradients(network, objective().loss({"network": network}, batch))
    without = gradients(network, objective(discriminator_weight=0.0).loss({"network": network}, batch))
    assert {name for name in found if name.startswith("critic.")} == found.keys() - without.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, without.get(name, torch.zeros_like(gradient))), name


def test_a_balanced_discriminator_pulls_at_each_image_as_its_weight_says(network: Autoencoder) -> None:
    """The gradient at the decoded image: that of pixels, and beside it one whose norm is half of its."""
    batch, norms = batch_of(2, step=10), {}
    for name, changed in (("none", {"discriminator_weight": 0.0}), ("both", {})):
        caught: list[Tensor] = []

        def catch(module: nn.Module, inputs: object, output: Tensor, caught: list[Tensor] = caught) -> None:
            output.register_hook(caught.append)

        hook = network.decoder.register_forward_hook(catch)
        gradients(network, objective(kl_weight=0.0, **changed).loss({"network": network}, batch))
        hook.remove()
        norms[name] = caught[0]
    added = (norms["both"] - norms["none"]).flatten(1).norm(dim=1)
    torch.testing.assert_close(added, 0.5 * norms["none"].flatten(1).norm(dim=1), atol=1e-9, rtol=1e-4)


def test_in_evaluation_latents_are_the_means_and_nothing_is_differentiated(network: Autoencoder) -> None:
    network.eval()
    with torch.no_grad():
        first = objective().loss({"network": network}, batch_of(2, step=10))
        again = objective().loss({"network": network}, replace(batch_of(2, step=11), step=11))
    assert torch.equal(first.parts["psnr"], again.parts["psnr"]) and torch.equal(first.total, again.total)
    assert first.parts.keys() == {"mse", "l1", "kl", "psnr"} and first.critic is None, "whatever its step"
    assert not first.total.requires_grad


@pytest.mark.parametrize("name", ["llava", "clip"])
def test_frozen_features_tell_images_apart_and_pass_a_gradient_to_them(name: str) -> None:
    model = open_perceptual(resolve_model(str(WEIGHTS / name)), layers=None, key="networks.perceptual")
    images = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1
    nearer = (images + 0.02 * torch.randn(images.shape)).requires_grad_()
    near, far = perceptual_distance(model, nearer, images), perceptual_distance(model, -images, images)
    assert torch.equal(perceptual_distance(model, images, images), torch.zeros(2))
    assert (near < far).all()
    (gradient,) = torch.autograd.grad(near.sum(), nearer)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert not any(weight.requires_grad for weight in model.parameters())


def test_features_are_the_hidden_states_that_are_asked_for_of_unit_length() -> None:
    model = open_perceptual(resolve_model(str(WEIGHTS / "clip")), layers=[0, -1], key="networks.perceptual")
    tower = CLIPVisionModel.from_pretrained(WEIGHTS / "clip").eval()
    side = model.config.side
    assert side is not None
    images = torch.rand(1, 3, side, side) * 2 - 1
    mean, std = (torch.tensor(each)[:, None, None] for each in (model.config.mean, model.config.std))
    with torch.no_grad():
        states = tower(pixel_values=((images / 2 + 0.5) - mean) / std, output_hidden_states=True).hidden_states
        for found, expected in zip(model(images), (states[0], states[-1]), strict=True):
            torch.testing.assert_close(found, nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)


def test_hidden_states_that_a_model_lacks_are_refused() -> None:
    with pytest.raises(UserError, match=r"networks\.perceptual .*clip has hidden states 0 to \d+, not all of \[99\]"):
        open_perceptual(resolve_model(str(WEIGHTS / "clip")), layers=[99], key="networks.perceptual")


def test_a_codec_of_16_channels_as_sd3s_is_opened_and_trained_as_it_is(tmp_path: Path) -> None:
    """f8c16 without the convolutions around its latents, with a shift: the layout of SD3's and FLUX's."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    model.save_pretrained(tmp_path)
    codec, network = open_codec(str(tmp_path)), load_codec(resolve_model(str(tmp_path)), key="starts_from")
    spec = codec.spec
    assert (spec.channels, spec.factor, spec.scale, spec.shift, spec.has_std) == (16, 8, 1.5305, 0.0609, True)
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    mean, std = codec.encode(images)
    assert std is not None
    noise = torch.randn(network.latent_shape(images.shape))
    with torch.no_grad():
        found = network(images, noise)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.images, codec.pixels(mean + std * noise).clone(), atol=1e-5, rtol=1e-4)


def test_a_deep_compression_autoencoder_is_read_and_not_trained(tmp_path: Path) -> None:
    folder = save_deep_codec(tmp_path / "dc")
    assert not open_codec(str(folder)).spec.has_std
    with pytest.raises(UserError, match=r"starts_from .* is a AutoencoderDC: only an AutoencoderKL is trained here"):
        read_codec_config(resolve_model(str(folder)), key="starts_from")

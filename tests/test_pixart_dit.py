"""DiT against diffusers' DiTTransformer2DModel."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from pixart.dit import DiT, DiTConfig
from pixart.layouts import dit_diffusers_copies, dit_diffusers_layout, load_weights

TINY = DiTConfig(num_layers=3, num_heads=2, head_dim=12, num_classes=10, sample_size=8, timestep_shift=1)
REAL_WIDTH = DiTConfig(num_layers=2, num_classes=10, sample_size=16, timestep_shift=1)


def reference_for(config: DiTConfig, seed: int = 0) -> DiTTransformer2DModel:
    """diffusers' model in evaluation mode (it drops labels itself), random weights everywhere, copies agreeing."""
    torch.manual_seed(seed)
    reference = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        num_embeds_ada_norm=config.num_classes,
        sample_size=config.sample_size,
        norm_eps=1e-6,
    )
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    weights = reference.state_dict()
    reference.load_state_dict(weights | {copy: weights[first] for copy, first in dit_diffusers_copies(config).items()})
    return reference.eval()


def ours_from(reference: DiTTransformer2DModel, config: DiTConfig) -> DiT:
    weights = reference.state_dict()
    for copy in dit_diffusers_copies(config):
        del weights[copy]
    model = load_weights(config, weights, dit_diffusers_layout(config), where="diffusers")
    assert isinstance(model, DiT)
    return model


def inputs_for(height: int, width: int):
    latents = torch.randn(3, 4, height, width, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([0, 417, 999]), torch.tensor([3, 10, 0])


@pytest.mark.parametrize(("config", "side"), [(TINY, 8), (TINY, 12), (REAL_WIDTH, 16)], ids=["tiny", "larger", "wide"])
def test_outputs_and_gradients_equal_diffusers(config, side):
    reference = reference_for(config)
    model = ours_from(reference, config)
    latents, timesteps, labels = inputs_for(side, side)
    expected = reference(latents, timestep=timesteps, class_labels=labels).sample
    actual = model(latents, timesteps, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) / expected[0].numel() ** 0.5
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for copy, first in dit_diffusers_copies(config).items():
        gradients[first] = gradients[first] + gradients[copy]
    parameters = dict(model.named_parameters())
    for theirs, (name,) in dit_diffusers_layout(config).items():
        gradient = parameters.pop(name).grad
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[theirs], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not parameters


def test_without_labels_the_class_embedding_is_zero():
    model = ours_from(reference_for(TINY), TINY)
    latents, timesteps, labels = inputs_for(8, 8)
    without = model(latents, timesteps, None)
    assert (without - model(latents, timesteps, labels)).abs().max() > 1e-3
    with torch.no_grad():
        model.label_embed.weight.zero_()
    torch.testing.assert_close(without, model(latents, timesteps, labels))


def test_batch_equals_singles_on_any_grid():
    model = ours_from(reference_for(TINY), TINY)
    latents, timesteps, labels = inputs_for(6, 14)
    together = model(latents, timesteps, labels)
    for i in range(3):
        alone = model(latents[i : i + 1], timesteps[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_new_model_predicts_zero_and_blocks_are_identities():
    model = DiT(TINY)
    latents, timesteps, labels = inputs_for(8, 8)
    assert model(latents, timesteps, labels).abs().max() == 0
    tokens = torch.randn(3, 16, 24)
    torch.testing.assert_close(model.blocks[0](tokens, torch.randn(3, 24), grid=(4, 4)), tokens)


def test_null_label_has_an_embedding():
    model = DiT(TINY)
    assert model.null_label == 10
    assert model.label_embed.num_embeddings == 11


def test_parameter_count_of_xl():
    with torch.device("meta"):
        model = DiT(DiTConfig())
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 675

"""Weights to and from diffusers' folders and the original files."""

import inspect
import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from errors import MissingFileError, UserError
from pixart.convert import infer_config, load_diffusers, load_original, save_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.layers import position_embedding
from pixart.layouts import NULL_CAPTION, export_weights, original_layout
from pixart.model import PixArt, PixArtConfig
from pixart.transformer_config import (
    DIT_DEFAULTS,
    FIXED_CONFIG,
    PIXART_DEFAULTS,
    WITHOUT_EFFECT,
    read_transformer_config,
)

PIXART = PixArtConfig(
    num_layers=2, num_heads=2, head_dim=12, caption_channels=20, sample_size=12, interpolation_scale=1.5
)
SIZED = PixArtConfig(num_layers=1, num_heads=2, head_dim=12, caption_channels=20, has_size_condition=True)
PER_BLOCK = replace(PIXART, adaln="per-block")
DIT = DiTConfig(num_layers=3, num_heads=2, head_dim=12, num_classes=10, sample_size=8, timestep_shift=1)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def assert_same_model(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert type(actual) is type(expected)
    assert actual.config == expected.config
    weights = expected.state_dict()
    assert actual.state_dict().keys() == weights.keys()
    for key, value in actual.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert all(parameter.requires_grad for parameter in actual.parameters())


@pytest.mark.parametrize(
    "model",
    [PixArt(PIXART), PixArt(SIZED), PixArt(PER_BLOCK), DiT(DIT)],
    ids=["pixart", "sized", "per-block", "dit"],
)
def test_folder_round_trip_is_exact(tmp_path, model):
    save_diffusers(randomise(model), tmp_path)
    assert_same_model(load_diffusers(tmp_path), model)


def test_diffusers_opens_our_pixart(tmp_path):
    model = randomise(PixArt(PIXART))
    save_diffusers(model, tmp_path)
    reference, info = PixArtTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    latents, text, timesteps = torch.randn(2, 4, 10, 16), torch.randn(2, 5, 20), torch.tensor([9, 900])
    expected = reference(latents, encoder_hidden_states=text, timestep=timesteps).sample
    torch.testing.assert_close(model(latents, timesteps, text), expected, rtol=1e-5, atol=1e-5)


def test_others_have_no_per_block_adaln_and_say_so(tmp_path):
    save_diffusers(PixArt(PER_BLOCK), tmp_path)
    with pytest.raises(NotImplementedError, match="`norm_type` is 'ada_norm_zero'"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"adaln is per-block, but PixArt's original \.pth"):
        original_layout(PER_BLOCK)


def test_diffusers_opens_our_dit(tmp_path):
    model = randomise(DiT(DIT))
    save_diffusers(model, tmp_path)
    reference, info = DiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    latents, labels, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 10]), torch.tensor([9, 900])
    expected = reference.eval()(latents, class_labels=labels, timestep=timesteps).sample
    torch.testing.assert_close(model(latents, timesteps, labels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"], ids=["one file", "shards"])
def test_we_open_folders_of_diffusers(tmp_path, shard_size):
    reference = randomise(
        PixArtTransformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=20,
            sample_size=128,
        )
    )
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    model = load_diffusers(tmp_path)
    # what diffusers reads from a sample size of 128
    assert model.config.has_size_condition and model.config.interpolation_scale == 2
    latents, text, timesteps = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 20), torch.tensor([9])
    added = {"resolution": torch.tensor([[1024.0, 1024.0]]), "aspect_ratio": torch.tensor([[1.0]])}
    expected = reference(latents, encoder_hidden_states=text, timestep=timesteps, added_cond_kwargs=added).sample
    actual = model(latents, timesteps, text, size=torch.tensor([[1024.0, 1024.0, 1.0]]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_we_open_folders_from_before_the_classes_were_split(tmp_path):
    save_diffusers(randomise(PixArt(PIXART)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    assert isinstance(load_diffusers(tmp_path), PixArt)


def test_timestep_shift_of_a_dit_survives_or_is_overridden(tmp_path):
    save_diffusers(DiT(DiTConfig(num_layers=1, num_heads=2, head_dim=12, timestep_shift=0)), tmp_path)
    assert load_diffusers(tmp_path).config.timestep_shift == 0
    config = json.loads((tmp_path / "config.json").read_text())
    del config["timestep_shift"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_diffusers(tmp_path).config.timestep_shift == 1
    assert load_diffusers(tmp_path, timestep_shift=0).config.timestep_shift == 0


def test_disagreeing_copies_are_refused(tmp_path):
    reference = DiTTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, num_embeds_ada_norm=10, sample_size=8
    )
    reference.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"transformer_blocks.1.norm1.emb.\S+ differs from transformer_blocks.0"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "geglu"}, "config.json: activation_fn is 'geglu', but only 'gelu-approximate' is supported"),
        ({"norm_type": "layer_norm"}, "of norm_type layer_norm, not a PixArt or DiT"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05, but only 1e-06 is supported"),
        ({"num_vector_embeds": 8}, "num_vector_embeds is 8, but only None is supported"),
        ({"cross_attention_dim": 32}, "cross_attention_dim is 32, but captions are projected to the width, 24"),
        ({"interpolation_scale": -1}, "interpolation_scale is -1, not a positive number"),
        ({"interpolation_scale": math.inf}, "interpolation_scale is inf, not a positive number"),
        ({"interpolation_scale": True}, "interpolation_scale is True, not a positive number"),
        ({"_class_name": ["x"], "norm_type": None}, r"describes \['x'\], not a PixArt or DiT"),
        ({"num_layers": "2"}, "num_layers is '2', not a positive whole number"),
        ({"caption_channels": None}, "caption_channels is None, not a positive whole number"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is {'bits': 4}, a setting that is not known here"),
        ({"num_layers": 3}, r"missing transformer_blocks.2"),
        ({"num_layers": 1}, r"unexpected transformer_blocks.1"),
        ({"caption_channels": 24}, r"is \(24, 20\), .* needs \(24, 24\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    save_diffusers(PixArt(PIXART), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_diffusers(tmp_path)


@pytest.mark.parametrize("model", [PixArt(SIZED), DiT(DIT)], ids=["pixart", "dit"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "ema"])
def test_original_files_round_trip(tmp_path, model, wrapper):
    weights = export_weights(randomise(model), original_layout(model.config))
    weights["pos_embed"] = torch.zeros(1, 16, 24)
    if isinstance(model, PixArt):
        weights["y_embedder.y_embedding"] = torch.zeros(120, 20)
    torch.save({wrapper: weights} if wrapper else weights, tmp_path / "model.pth")
    assert_same_model(load_original(tmp_path / "model.pth", model.config), model)


def test_original_layouts_have_the_published_names():
    pixart = set(original_layout(SIZED))
    assert {
        "x_embedder.proj.weight",
        "t_embedder.mlp.2.bias",
        "t_block.1.weight",
        "y_embedder.y_proj.fc1.weight",
        "csize_embedder.mlp.0.weight",
        "ar_embedder.mlp.2.weight",
        "blocks.0.scale_shift_table",
        "blocks.0.attn.qkv.weight",
        "blocks.0.cross_attn.kv_linear.bias",
        "blocks.0.mlp.fc2.weight",
        "final_layer.scale_shift_table",
        "final_layer.linear.weight",
    } <= pixart
    dit = set(original_layout(DIT))
    assert {
        "y_embedder.embedding_table.weight",
        "blocks.2.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    } <= dit


def test_keys_that_are_left_out_or_without_effect_are_those_of_diffusers(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel", "caption_channels": 20}')
    config = read_transformer_config(tmp_path)
    assert config == PixArtConfig(caption_channels=20, sample_size=128, interpolation_scale=2, has_size_condition=True)
    for transformer, defaults in ((PixArtTransformer2DModel, PIXART_DEFAULTS), (DiTTransformer2DModel, DIT_DEFAULTS)):
        theirs = {name: value.default for name, value in inspect.signature(transformer.__init__).parameters.items()}
        del theirs["self"]
        known = defaults.keys() | FIXED_CONFIG.keys() | set(WITHOUT_EFFECT)
        assert theirs.keys() <= known
        for name in (defaults.keys() & theirs.keys()) - {"cross_attention_dim"}:
            assert theirs[name] == defaults[name], name
    harmless = {"norm_num_groups": 8, "num_embeds_ada_norm": 500, "new_trick": None, "use_linear_projection": False}
    save_diffusers(randomise(PixArt(PIXART)), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | harmless))
    assert load_diffusers(tmp_path).config == PIXART
    (tmp_path / "config.json").unlink()
    (tmp_path / "PixArt.pth").write_bytes(b"x")
    with pytest.raises(MissingFileError, match=r"has no config\.json of a transformer, but PixArt\.pth: if that is"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("sample_size", "scale"),
    [(8, 0.5), (8, 1.0), (8, 2.0), (8, 1.125), (8, 0.33), (128, 1.5), (128, 2.0), (128, 0.625), (128, 4.13)],
)
def test_stored_positions_say_how_far_they_are_apart(sample_size, scale):
    config = PixArtConfig(num_layers=1, num_heads=6, head_dim=64, caption_channels=20, sample_size=sample_size)
    weights = export_weights(PixArt(config), original_layout(config))
    side = sample_size // 2
    positions = position_embedding(side, side, channels=384, base_size=side, scale=scale)[None]
    rounded = positions.bfloat16()
    for stored in (positions, positions.half(), rounded, rounded.float()):
        assert infer_config(weights | {"pos_embed": stored}) == replace(config, interpolation_scale=scale)
    # of zeros, which nobody filled, the scale is that of PixArt's configs
    expected = replace(config, interpolation_scale=max(sample_size // 64, 1))
    assert infer_config(weights | {"pos_embed": torch.zeros_like(positions)}) == expected
    with pytest.raises(UserError, match="pos_embed does not hold the sines and cosines of a square grid"):
        infer_config(weights | {"pos_embed": positions + 0.1})
    with pytest.raises(UserError, match="pos_embed does not hold the sines and cosines of a square grid"):
        infer_config(weights | {"pos_embed": positions * math.nan})


@pytest.mark.parametrize(("num_tokens", "sample_size", "scale"), [(300, 32, 0.5), (300, 256, 4.0), (120, 32, 1.0)])
def test_a_file_without_positions_has_those_of_sigma_if_its_null_caption_is_sigmas(num_tokens, sample_size, scale):
    config = PixArtConfig(num_layers=1, num_heads=6, head_dim=64, caption_channels=20, sample_size=sample_size)
    weights = export_weights(PixArt(config), original_layout(config))
    found = infer_config(weights | {NULL_CAPTION: torch.zeros(num_tokens, 20)}, sample_size=sample_size)
    assert found == replace(config, interpolation_scale=scale)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("is_safe", [True, False])
def test_folders_open_as_people_have_them(tmp_path, variant, shard_size, is_safe):
    reference = PixArtTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=8,
    )
    reference.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size, safe_serialization=is_safe)
    assert len(list(tmp_path.iterdir())) == 2 or shard_size == "20KB"
    model = load_diffusers(tmp_path)
    assert torch.equal(model.final.weight, reference.proj_out.weight)

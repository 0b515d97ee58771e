"""Keys and values of 2 x 2 tokens as one (PixArt-Sigma): its arithmetic, its names in files, and who refuses it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from errors import UserError
from pixart.convert import infer_config, load_diffusers, original_weights, save_diffusers
from pixart.layers import SelfAttention, TokenCompression
from pixart.layouts import load_weights, original_layout
from pixart.model import PixArt, PixArtConfig
from training.stages.starts import with_compression

CONFIG = PixArtConfig(num_layers=3, num_heads=2, head_dim=16, caption_channels=20, sample_size=8)
COMPRESSED = replace(CONFIG, kv_compressed_blocks=(1, 2))
PUBLISHED = replace(COMPRESSED, num_heads=6, head_dim=64)  # only published widths tell their heads


def network_of(config: PixArtConfig) -> PixArt:
    torch.manual_seed(0)
    network = PixArt(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def output_of(network: PixArt, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, height, width, generator=generator)
    text = torch.randn(2, 5, 20, generator=generator)
    return network(latents, torch.tensor([10, 700]), text)


def read_by(attention: SelfAttention, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with plain formulas."""
    query, key, value = (rows.unflatten(-1, (2, -1)).transpose(1, 2) for rows in (attention.query(x), key, value))
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return attention.out((scores @ value).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("grid", [(4, 6), (5, 4), (3, 7), (1, 1)], ids=str)
def test_at_first_keys_and_values_are_averages_of_the_tokens_there_are(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(32, 2, is_compressed=True)
    assert attention.compression is not None
    attention.compression.average_()
    x = torch.randn(2, grid[0] * grid[1], 32)

    def averaged(rows: Tensor) -> Tensor:
        image = rows.transpose(1, 2).unflatten(2, grid)
        average = F.avg_pool2d(image, 2, ceil_mode=True).flatten(2).transpose(1, 2)
        return F.layer_norm(average, (32,), eps=1e-5)

    expected = read_by(attention, x, averaged(attention.key(x)), averaged(attention.value(x)))
    torch.testing.assert_close(attention(x, grid), expected, rtol=1e-5, atol=1e-6)


def test_one_convolution_of_stride_2_and_one_norm_serve_keys_and_values() -> None:
    attention = SelfAttention(32, 2, is_compressed=True)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, weights = torch.randn(2, 24, 32), attention.state_dict()

    def compressed(rows: Tensor) -> Tensor:
        windows = rows.view(2, 2, 2, 3, 2, 32)  # [B, rows, 2, columns, 2, D]
        kernel = weights["compression.convolution.weight"].squeeze(1).permute(1, 2, 0)  # [2, 2, D]
        sums = torch.einsum("brucvd,uvd->brcd", windows, kernel) + weights["compression.convolution.bias"]
        norm = weights["compression.norm.weight"], weights["compression.norm.bias"]
        return F.layer_norm(sums.flatten(1, 2), (32,), *norm, eps=1e-5)

    expected = read_by(attention, x, compressed(attention.key(x)), compressed(attention.value(x)))
    torch.testing.assert_close(attention(x, (4, 6)), expected, rtol=1e-4, atol=1e-5)


def test_original_files_name_the_blocks_that_compress(tmp_path: Path) -> None:
    network = network_of(PUBLISHED)
    weights = original_weights(network)
    assert weights["blocks.1.attn.sr.weight"].shape == (384, 1, 2, 2)
    assert {key for key in weights if ".attn.sr." in key or ".attn.norm." in key} == {
        f"blocks.{block}.attn.{part}.{kind}"
        for block in (1, 2)
        for part in ("sr", "norm")
        for kind in ("weight", "bias")
    }
    found = infer_config(weights)
    assert found == PUBLISHED
    assert isinstance(found, PixArtConfig)
    again = load_weights(found, weights, original_layout(found), where="file")
    assert isinstance(again, PixArt)
    assert torch.equal(output_of(again), output_of(network))
    without = {key: value for key, value in weights.items() if ".attn.sr." not in key and ".attn.norm." not in key}
    assert infer_config(without) == replace(PUBLISHED, kv_compressed_blocks=())
    wider = weights | {"blocks.2.attn.sr.weight": torch.zeros(384, 1, 4, 4)}
    with pytest.raises(UserError, match=r"file: blocks\.2\.attn\.sr\.weight is \(384, 1, 4, 4\), .* \(384, 1, 2, 2\)"):
        load_weights(found, wider, original_layout(found), where="file")


def test_folders_say_it_and_diffusers_which_would_pass_over_it_refuses_them(tmp_path: Path) -> None:
    network = network_of(COMPRESSED)
    save_diffusers(network, tmp_path)
    again = load_diffusers(tmp_path)
    assert again.config == COMPRESSED
    assert isinstance(again, PixArt)
    assert torch.equal(output_of(again), output_of(network))
    with pytest.raises(NotImplementedError, match="ada_norm_single_kv_compression"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_compressed_blocks": [2, 1]}, r"config\.json: kv_compressed_blocks \[2, 1\] are not blocks from 0 to 2"),
        ({"kv_compressed_blocks": [1, 3]}, r"kv_compressed_blocks \[1, 3\] are not blocks from 0 to 2, in order"),
        ({"kv_compressed_blocks": "1-2"}, r"kv_compressed_blocks is '1-2', not a list of numbers of blocks"),
        ({"kv_compressed_blocks": []}, r"norm_type is 'ada_norm_single_kv_compression', which .* \[\] contradicts"),
        ({"norm_type": "ada_norm_single"}, r"norm_type is 'ada_norm_single', which .* \[1, 2\] contradicts"),
    ],
)
def test_folders_that_contradict_themselves_are_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    save_diffusers(network_of(COMPRESSED), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(UserError, match=message):
        load_diffusers(tmp_path)


def test_per_block_adaln_knows_no_compression() -> None:
    with pytest.raises(UserError, match=r"kv_compressed_blocks \[1, 2\] need adaLN-single, but adaln is per-block"):
        replace(COMPRESSED, adaln="per-block")


def test_compression_is_turned_on_block_by_block_and_not_off() -> None:
    network = network_of(CONFIG)
    assert with_compression(network, None, key="start") is network
    some = with_compression(network, [2], key="start")
    for value in some.blocks[2].get_submodule("attention.compression").parameters():
        nn.init.normal_(value)
    more = with_compression(some, [1, 2], key="start")
    assert more.config == COMPRESSED
    weights, former = more.state_dict(), some.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in former.items())
    fresh = TokenCompression(32)
    fresh.average_()
    compression = more.blocks[1].get_submodule("attention.compression").state_dict()
    assert all(torch.equal(compression[name], value) for name, value in fresh.state_dict().items())
    with pytest.raises(UserError, match=r"start compresses keys and values in block 1, which .* = \[2\] of the stage"):
        with_compression(more, [2], key="start")
    with pytest.raises(UserError, match=r"start: kv_compressed_blocks \[1, 9\] are not blocks from 0 to 2, in order"):
        with_compression(network, [1, 9], key="start")


def test_a_change_far_away_is_read_through_the_compressed_tokens() -> None:
    network = network_of(COMPRESSED)
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 10, 8, generator=generator), torch.randn(1, 5, 20, generator=generator)
    moved = latents.clone()
    moved[..., -1, -1] += 1.0  # in the odd row, which the original code would drop
    apart = (network(latents, torch.tensor([10]), text) - network(moved, torch.tensor([10]), text)).abs()
    assert apart[..., 0, 0].max() > 1e-6

"""Images decoded a tile at a time: in half of the memory, and with the pixels that the whole has.

A tile is a band of rows, as wide as the image. Layers go over an image one after another, each tile by tile with as
many rows around it as the layer reads, and normalisation has the mean and deviation of the whole image. So there is
nothing to blend and no seam, where decoders that are run on each tile alone normalise each by itself (diffusers'
`enable_tiling`). Beside what a layer reads and what it gives, memory holds a few tiles.
"""

# B images, C channels, H W height and width of a layer's image, G groups of channels

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Of a tile in float32: enough rows to fill a GPU, of which few are read twice.
TILE_BYTES = 2**26


def can_tile_kl(decoder: Any) -> bool:
    """Whether a diffusers `Decoder` is made of the layers that `kl_pixels` goes over."""
    from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D

    return isinstance(decoder.conv_norm_out, nn.GroupNorm) and all(
        type(block) is UpDecoderBlock2D and all(map(_is_plain, block.resnets)) for block in decoder.up_blocks
    )


def kl_pixels(decoder: Any, latents: Tensor) -> Tensor:
    """Return what a diffusers `Decoder` makes of [B, C, h, w]."""
    hidden = decoder.mid_block(decoder.conv_in(latents))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = _resnet(resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = _by_tiles(upsampler, hidden, halo=1, factor=2)
    return _by_tiles(_normalised(decoder.conv_norm_out, hidden, decoder.conv_act, decoder.conv_out), hidden, halo=1)


def dc_pixels(decoder: Any, latents: Tensor) -> Tensor:
    """Return what a diffusers `AutoencoderDC`'s decoder makes of [B, C, h, w]."""
    from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, ResBlock

    hidden = decoder.conv_in(latents)
    if decoder.in_shortcut:
        hidden = hidden + latents.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
    for layer in (layer for block in reversed(decoder.up_blocks) for layer in block):
        if isinstance(layer, DCUpBlock2d):
            hidden = _by_tiles(layer, hidden, halo=1, factor=2)
        elif isinstance(layer, ResBlock) and not isinstance(layer.norm, nn.BatchNorm2d | nn.GroupNorm):
            hidden = _by_tiles(layer, hidden, halo=2)
        else:
            hidden = layer(hidden)  # attention, where images are small

    def last(rows: Tensor) -> Tensor:
        return decoder.conv_out(decoder.conv_act(decoder.norm_out(rows.movedim(1, -1)).movedim(-1, 1)))

    return _by_tiles(last, hidden, halo=1, factor=2 if isinstance(decoder.conv_out, DCUpBlock2d) else 1)


def _is_plain(resnet: Any) -> bool:
    is_told_nothing = resnet.time_embedding_norm in ("default", "group") and resnet.time_emb_proj is None
    return is_told_nothing and resnet.upsample is None and resnet.downsample is None


def _resnet(resnet: Any, hidden: Tensor) -> Tensor:
    """Return what a `ResnetBlock2D` makes of [B, C, H, W]."""
    first = _normalised(resnet.norm1, hidden, resnet.nonlinearity, resnet.conv1)
    inner = _by_tiles(first, hidden, halo=1)
    second = _normalised(resnet.norm2, inner, resnet.nonlinearity, resnet.conv2)
    inner = _by_tiles(second, inner, halo=1, in_place=True)
    for start, stop in _tiles(hidden):
        rows = hidden[:, :, start:stop]
        inner[:, :, start:stop] += rows if resnet.conv_shortcut is None else resnet.conv_shortcut(rows)
    return inner if resnet.output_scale_factor == 1 else inner.div_(resnet.output_scale_factor)


def _normalised(norm: nn.GroupNorm, hidden: Tensor, activate: Any, layer: Any) -> Callable[[Tensor], Tensor]:
    """Return what gives layer(activate(norm(rows))) of rows of `hidden` [B, C, H, W], normalised as the whole of it."""
    mean, variance = _statistics(hidden, norm.num_groups)
    deviation = (variance + norm.eps).rsqrt()
    each = norm.num_channels // norm.num_groups
    scale = deviation.repeat_interleave(each, dim=1).float() * norm.weight  # [B, C]
    shift = norm.bias - mean.repeat_interleave(each, dim=1).float() * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]

    def compute(rows: Tensor) -> Tensor:
        # Rounded once, as by the layer itself.
        return layer(activate(torch.addcmul(shift, rows.float(), scale).to(rows.dtype)))

    return compute


def _statistics(hidden: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the groups of [B, C, H, W], float64 [B, G]."""
    parts = []
    for start, stop in _tiles(hidden):
        rows = hidden[:, :, start:stop].float().unflatten(1, (num_groups, -1)).flatten(2)  # [B, G, values]
        variance, mean = torch.var_mean(rows, dim=2, correction=0)
        parts.append(((stop - start) / hidden.shape[2], mean.double(), variance.double()))
    mean = torch.stack([share * part for share, part, _ in parts]).sum(0)
    variance = torch.stack([share * (within + (part - mean) ** 2) for share, part, within in parts]).sum(0)
    return mean, variance


def _by_tiles(
    layer: Callable[[Tensor], Tensor], hidden: Tensor, *, halo: int, factor: int = 1, in_place: bool = False
) -> Tensor:
    """Return layer(hidden) of [B, C, H, W], tile by tile; `layer` reads `halo` rows around a row, and gives `factor`.

    `in_place` puts what the layer gives where it has read, and is for layers that give as many channels.
    """
    height, given, former = hidden.shape[2], hidden if in_place else None, None
    for start, stop in _tiles(hidden):
        low, high = max(0, start - halo), min(height, stop + halo)
        rows = hidden[:, :, low:high]
        if in_place:
            rows = rows if former is None else torch.cat([former, hidden[:, :, start:high]], dim=2)
            former = hidden[:, :, max(0, stop - halo) : stop].clone()  # before it is written over
        tile = layer(rows)[:, :, (start - low) * factor : (stop - low) * factor]
        if given is None:
            is_last = hidden.is_contiguous(memory_format=torch.channels_last)
            given = torch.empty(
                (len(tile), tile.shape[1], height * factor, tile.shape[3]),
                dtype=tile.dtype,
                device=tile.device,
                memory_format=torch.channels_last if is_last else torch.contiguous_format,
            )
        given[:, :, start * factor : stop * factor] = tile
    assert given is not None
    return given


def _tiles(hidden: Tensor) -> Iterator[tuple[int, int]]:
    """Yield first row and the row behind the last of each tile of [B, C, H, W]."""
    batch, channels, height, width = hidden.shape
    rows = max(1, TILE_BYTES // (batch * channels * width * 4))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)

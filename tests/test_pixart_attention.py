"""Attention over packed texts against torch's of one text at a time, and the kernels in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pixart.attention import Packing, attend_to_text, lay_out, pack
from pixart.model import PixArt, PixArtConfig, pack_text

LENGTHS = (5, 1, 3)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Give [B, N, H, E] of queries [B, N, H, E] and packed keys and values [T, H, E], a text at a time."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    results = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (image, key[own], value[own]))).transpose(0, 1)
        for image, own in zip(query, rows, strict=True)
    ]
    return torch.stack(results)


@pytest.mark.parametrize("num_padding", [0, 4])
def test_packed_texts_are_attended_to_as_one_by_one_and_rows_of_no_text_count_for_nothing(num_padding: int) -> None:
    num_tokens = sum(LENGTHS) + num_padding
    query, key, value = draw(3, 6, 2, 8, seed=0), draw(num_tokens, 2, 8, seed=1), draw(num_tokens, 2, 8, seed=2)
    key[sum(LENGTHS) :] = torch.nan
    value[sum(LENGTHS) :] = torch.inf
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    packing = pack(offsets, num_tokens=num_tokens, max_length=5, has_equal_lengths=False, query=query)
    inputs = [each.requires_grad_() for each in (query, key, value)]
    result = attend_to_text(query, lay_out(key, packing), lay_out(value, packing), packing)
    expected = one_by_one(query, key, value, LENGTHS)
    torch.testing.assert_close(result, expected)
    weights = draw(*result.shape, seed=3)
    found, wanted = (torch.autograd.grad(each, inputs, weights) for each in (result, expected))
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, reference)
    assert not found[1][sum(LENGTHS) :].any()
    assert not found[2][sum(LENGTHS) :].any()


def test_texts_of_one_length_need_neither_mask_nor_copy() -> None:
    offsets = torch.arange(4, dtype=torch.int32) * 5
    rows = draw(15, 2, 8, seed=0)
    packing = pack(offsets, num_tokens=15, max_length=5, has_equal_lengths=True, query=rows)
    assert packing.bias is None
    assert lay_out(rows, packing).data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("adaln", ["single", "per-block"])
def test_a_network_reads_packed_texts_as_padded_ones(adaln: str) -> None:
    config = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=12, sample_size=8, adaln=adaln)
    network = PixArt(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text, latents = draw(3, 7, 12, seed=1), draw(3, 4, 8, 8, seed=2)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    times = torch.tensor([3, 500, 999])
    packed = pack_text(text, mask)
    longer = packed._replace(values=F.pad(packed.values, (0, 0, 0, 6)), max_length=8)
    expected = torch.cat(
        [network(latents[i : i + 1], times[i : i + 1], text[i : i + 1, : LENGTHS[i]]) for i in range(3)]
    )
    for given in (packed, longer, network.read_text(longer)):
        torch.testing.assert_close(network(latents, times, given), expected)
    torch.testing.assert_close(network(latents, times, text, mask), expected)


KERNELS = """
import sys, torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from pixart.attention_kernels import text_attention_backward, text_attention_forward

torch.manual_seed(0)
for num_images, num_queries, num_heads, head_dim, lengths, padding in (
    (2, 100, 2, 72, (5, 300), 3), (1, 600, 1, 64, (37,), 0), (2, 70, 1, 40, (9, 128), 1),
):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    query, gradient = torch.randn(2, num_images, num_queries, num_heads, head_dim)
    key, value = torch.randn(2, sum(lengths) + padding, num_heads, head_dim)
    out, sums = text_attention_forward(query, key, value, offsets)
    found = text_attention_backward(gradient, query, key, value, out, sums, offsets, max_length=max(lengths))
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    start, results = 0, []
    for image, length in zip(exact[0], lengths):
        own = [image, *(tensor[start : start + length] for tensor in exact[1:])]
        results.append(sdpa(*(tensor.transpose(0, 1) for tensor in own)).transpose(0, 1))
        start += length
    expected = torch.stack(results)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    for mine, reference in zip((out, *found), (expected, *wanted)):
        error = float((mine.double() - reference.detach()).norm() / reference.detach().norm())
        assert error < 1e-6, (head_dim, lengths, error)
    assert not found[1][sum(lengths):].any() and not found[2][sum(lengths):].any()

# Scores so far below zero that the weight of a key that is not there, whose score is zero, would be infinite.
query[..., 0], key[..., 0] = 10.0, -110.0
out, sums = text_attention_forward(query, key, value, offsets)
assert sums.max() < -130
found = text_attention_backward(gradient, query, key, value, out, sums, offsets, max_length=max(lengths))
assert all(each.isfinite().all() for each in (out, *found))
"""


def test_the_kernel_refuses_forward_derivatives_which_torch_would_leave_out() -> None:
    packing = Packing(torch.tensor([0, 5], dtype=torch.int32), 5, places=None, bias=None)
    query, key = draw(1, 4, 2, 8, seed=0), draw(5, 2, 8, seed=1)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward derivatives"):
        attend_to_text(forward_ad.make_dual(query, query), key, key, packing)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; torch for CUDA brings it")
def test_the_kernels_give_what_torch_gives_in_fp32() -> None:
    subprocess.run([sys.executable, "-c", KERNELS], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_kernels_are_as_exact_as_bfloat16() -> None:
    offsets = torch.tensor([0, 80, 119, 240], dtype=torch.int32, device="cuda")
    query, weights = torch.randn(2, 3, 256, 16, 72, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 256, 16, 72, device="cuda", dtype=torch.bfloat16)
    inputs = [each.requires_grad_() for each in (query, key, value)]
    result = torch.ops.pixart.text_attention(*inputs, offsets, 128)[0]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = one_by_one(*exact, (80, 39, 121))
    found = [result, *torch.autograd.grad(result, inputs, weights)]
    for mine, reference in zip(found, [expected, *torch.autograd.grad(expected, exact, weights.double())], strict=True):
        assert (mine.double() - reference).norm() < 5e-3 * reference.norm()

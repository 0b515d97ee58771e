"""The Triton kernels of captioning, by Triton's interpreter, against torch's own operations over the same cache."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

KERNELS = """
import torch
from captioning.engines.cache_kernels import append_and_attend, turn_and_place

torch.manual_seed(0)
for num_heads, num_key_heads, width in ((4, 4, 16), (6, 2, 24), (9, 3, 32)):
    cos, sin = torch.randn(2, 80, width)
    mixed = torch.randn(5, num_heads + 2 * num_key_heads, width)
    turned = mixed[:, : num_heads + num_key_heads]
    keys, values = torch.randn(2, 4, num_key_heads, 64, width)
    tables = {"cos": cos, "signed_sin": sin, "num_heads": num_heads}

    slots, positions = torch.tensor([0, 2, 2, 1, 3]), torch.tensor([7, 0, 63, 33, 5])
    cached = [keys.clone(), values.clone()]
    queries = turn_and_place(mixed, slots, positions, *cached, **tables)
    at = lambda places: turned * cos[places][:, None] + turned.roll(width // 2, -1) * sin[places][:, None]
    torch.testing.assert_close(queries, at(positions)[:, :num_heads])
    expected = [keys.clone(), values.clone()]
    expected[0][slots, :, positions] = at(positions)[:, num_heads:]
    expected[1][slots, :, positions] = mixed[:, num_heads + num_key_heads :]
    torch.testing.assert_close(cached, expected)

    lengths = torch.tensor([0, 31, 63])
    mixed, turned = mixed[:3], turned[:3]
    cached = [keys.clone(), values.clone()]
    answers = append_and_attend(mixed, lengths, *cached, scale=0.3, **tables)
    expected = [keys.clone(), values.clone()]
    expected[0][torch.arange(3), :, lengths] = at(lengths)[:, num_heads:]
    expected[1][torch.arange(3), :, lengths] = mixed[:, num_heads + num_key_heads :]
    torch.testing.assert_close(cached, expected)
    for row, length in enumerate(lengths.tolist()):
        read = [tensor[row, :, : length + 1].repeat_interleave(num_heads // num_key_heads, 0) for tensor in expected]
        scores = at(lengths)[row, :num_heads, None] @ read[0].transpose(1, 2) * 0.3
        torch.testing.assert_close(answers[row], (scores.softmax(-1) @ read[1]).flatten())
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; torch for CUDA brings it")
def test_the_kernels_place_and_attend_as_torchs_operations_do() -> None:
    subprocess.run([sys.executable, "-c", KERNELS], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})

"""A T5 encoder over packed texts: matrix products see real tokens alone, and a layer is few passes over memory.

Beside its products transformers' forward spends as much time again on a GPU: normalisation in six kernels, a GELU in
eight, sums of their own, masks, and padding in all of them. Here a normalisation is one kernel, a residual is what the
product adds to, and padding exists in attention alone, which is 1% of the work. Rounding is less, too: a sum is rounded
with its product, once.
"""

# N tokens of a batch without padding, B texts, L longest text's tokens, W model width, H heads, D head width, F hidden

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from encoders.compilation import compile_pointwise
from encoders.text import PackedTexts


class _Layer(nn.Module):
    """A block of T5's encoder, with projections that read the same input side by side."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        self.is_gated = hasattr(feed_forward, "wi_0")
        self.attention_norm, self.mlp_norm = block.layer[0].layer_norm, block.layer[1].layer_norm
        self.query_key_value = _side_by_side([attention.q, attention.k, attention.v])
        self.output = attention.o
        self.up = _side_by_side([feed_forward.wi_0, feed_forward.wi_1]) if self.is_gated else feed_forward.wi
        self.down = feed_forward.wo


class PackedT5(nn.Module):
    """The encoder half of a T5; takes the weights over from transformers' model, which is of no use then."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config, blocks = model.config, model.encoder.block
        self.embed = model.shared
        first = blocks[0].layer[0].SelfAttention
        self.relative_bias, self._bucket = first.relative_attention_bias, first._relative_position_bucket
        self._num_buckets, self._max_distance = (
            config.relative_attention_num_buckets,
            first.relative_attention_max_distance,
        )
        self._head_width, self._epsilon = config.d_kv, config.layer_norm_epsilon
        self.norm = model.encoder.final_layer_norm
        act = blocks[0].layer[1].DenseReluDense.act
        # The tanh approximation, which transformers makes of eight kernels.
        self._activate = _gelu_tanh if config.dense_act_fn == "gelu_new" else act
        self._normalise, self._gate = _rms_norm, _gate
        layers: list[nn.Module] = []
        while blocks:
            # One after another, so that no more than a layer is held twice.
            layers.append(_Layer(blocks.pop(0)))
        self.layers = nn.ModuleList(layers)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.embed.weight.device

    def compile_kernels(self) -> None:
        """Compile what lies between the products: a kernel for each normalisation and for gate and GELU together."""
        self._normalise, self._gate = compile_pointwise(_rms_norm), compile_pointwise(_gate)

    def forward(self, texts: PackedTexts) -> Tensor:
        """Return the last hidden states [N, W] of packed texts."""
        bias = self._attention_bias(texts.is_real)  # [B, H, L, L]
        hidden = self.embed(texts.input_ids)  # [N, W]
        layers: Any = self.layers
        for layer in layers:
            mixed = layer.query_key_value(self._norm(hidden, layer.attention_norm))  # [N, 3 H D]
            hidden = _add_product(hidden, self._attend(mixed, bias, texts), layer.output)
            raised = layer.up(self._norm(hidden, layer.mlp_norm))  # [N, 2 F], or [N, F] without a gate
            raised = self._gate(raised, self._activate) if layer.is_gated else self._activate(raised)
            hidden = _add_product(hidden, raised, layer.down)
        return self._norm(hidden, self.norm)

    def _norm(self, hidden: Tensor, norm: Any) -> Tensor:
        return self._normalise(hidden, norm.weight, self._epsilon)

    def _attention_bias(self, is_real: Tensor) -> Tensor:
        """Return what is added to scores, which T5 does not scale: the bias by distance, and -inf at padding."""
        columns = torch.arange(is_real.shape[1], device=is_real.device)  # [L]
        distances = columns - columns[:, None]  # [L, L]
        buckets = self._bucket(distances, num_buckets=self._num_buckets, max_distance=self._max_distance)
        bias = self.relative_bias(buckets).permute(2, 0, 1)  # [H, L, L]
        mask = bias.new_zeros(is_real.shape).masked_fill_(~is_real, -torch.inf)  # [B, L]
        return (bias + mask[:, None, None]).contiguous()

    def _attend(self, mixed: Tensor, bias: Tensor, texts: PackedTexts) -> Tensor:
        padded = mixed.index_select(0, texts.tokens.flatten())  # [B * L, 3 H D]
        padded = padded.view(*texts.tokens.shape, 3, -1, self._head_width)  # [B, L, 3, H, D]
        queries, keys, values = padded.permute(2, 0, 3, 1, 4)  # [B, H, L, D] each
        # cuDNN would make a plan for every shape, of which there are many, and flash kernels take no bias.
        kernel = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if mixed.is_cuda else contextlib.nullcontext()
        with kernel:
            answers = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
        answers = answers.transpose(1, 2).reshape(len(padded) * padded.shape[1], -1)  # [B * L, H D]
        return answers.index_select(0, texts.places)


def _add_product(hidden: Tensor, inputs: Tensor, linear: nn.Linear) -> Tensor:
    """Add a layer's output to the residual stream [N, W], in place: a product adds to what is there as it writes."""
    if is_traceable_wrapper_subclass(linear.weight):  # in 8 bits, which know how to multiply and nothing else
        return hidden.add_(linear(inputs))
    return hidden.addmm_(inputs, linear.weight.t())


def _rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(hidden, weight.shape, weight, epsilon)


def _gelu_tanh(hidden: Tensor) -> Tensor:
    return functional.gelu(hidden, approximate="tanh")


def _gate(raised: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
    gate, value = raised.chunk(2, dim=-1)
    return activate(gate).mul_(value)


def _side_by_side(projections: list[Any]) -> nn.Linear:
    weight = torch.cat([projection.weight.detach() for projection in projections])
    fused = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    return fused

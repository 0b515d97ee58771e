"""What each block of a network keeps for its backward pass; the network itself knows nothing of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

import pixart.attention  # noqa: F401  (registers the operator)
from pixart.block import blocks_of
from training.config import KeepActivations

_aten = torch.ops.aten
# Results that take long to compute: of matrix products, convolutions and attention. Norms, modulation, GELU and sums
# do not.
PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.pixart.text_attention.default,
]


def keep_activations(network: nn.Module, kept: KeepActivations) -> None:
    """Let the blocks of a network keep only some activations; what is not kept, the backward pass computes again.

    "all" keeps what autograd asks for. "products" keeps the results of matrix products and attention, by torch's
    selective checkpointing, eager and compiled. "inputs" keeps what goes into a block and recomputes all of it.
    """
    if kept == "all":
        return
    context_fn = partial(create_selective_checkpoint_contexts, PRODUCTS) if kept == "products" else noop_context_fn
    for block in blocks_of(network):
        # On the module itself and not in a wrapper around it, which would give its weights other names.
        block.forward = _recomputing(block.forward, context_fn)


def _recomputing(forward: Callable[..., Any], context_fn: Callable[..., Any]) -> Callable[..., Any]:
    def recomputing_forward(*inputs: Any, **named_inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named_inputs)
        # Blocks draw no random numbers, so there is no generator to put back.
        return checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn, **named_inputs
        )

    return recomputing_forward

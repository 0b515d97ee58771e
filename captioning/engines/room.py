"""How many captions fit a GPU's memory at a time, from the shapes of what they take."""

from typing import Any

import torch

from captioning.engines.decoding import PREFILL_TOKENS, REFILL_DIVISOR
from captioning.engines.slots import round_capacity

# Without a GPU, or on one whose other workers nobody knows.
DEFAULT_SLOTS = 32
# Beyond, the keys and values of all rows take so much of a step that more rows gain little, and the end of a slice,
# when rows run dry, costs more.
MAX_SLOTS = 128
SLOT_MULTIPLE = 8
# Of the device's memory: the rest is for CUDA itself, its graphs, CLIP's scores and what the allocator cannot use.
USABLE_SHARE = 0.9


def count_slots(model: Any, *, gpu_share: float, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many captions a model decodes at a time, where the recipe leaves it open.

    As many as `gpu_share` of its GPU's memory holds beside the weights and the reading of new prompts, a multiple of
    `SLOT_MULTIPLE` up to `MAX_SLOTS`; `num_prompt_tokens` is of the longest prompt that is expected. It depends on the
    device and on what others hold of it. `DEFAULT_SLOTS` on a CPU, and where the share is unknown, which is 0.
    """
    if model.device.type == "cpu" or gpu_share == 0:
        return DEFAULT_SLOTS
    # The projections were laid side by side, piece by piece: their former places are no use to larger tensors.
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(model.device)
    held_bytes = torch.cuda.memory_allocated(model.device)
    # What is free now may be for a worker that comes to this GPU next.
    budget_bytes = min(free_bytes, int(gpu_share * USABLE_SHARE * total_bytes) - held_bytes)
    return slots_within(budget_bytes, model, num_prompt_tokens=num_prompt_tokens, max_new_tokens=max_new_tokens)


def slots_within(budget_bytes: int, model: Any, *, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many slots `budget_bytes` beside the weights hold, in steps of `SLOT_MULTIPLE`; at least one step."""
    for num_slots in range(MAX_SLOTS, SLOT_MULTIPLE, -SLOT_MULTIPLE):
        cache = num_slots * slot_bytes(model, num_tokens=num_prompt_tokens + max_new_tokens)
        num_read = min(num_slots // REFILL_DIVISOR, max(1, PREFILL_TOKENS // num_prompt_tokens))
        if cache + prefill_bytes(model, num_prompts=num_read, num_prompt_tokens=num_prompt_tokens) <= budget_bytes:
            return num_slots
    return SLOT_MULTIPLE


def slot_bytes(model: Any, *, num_tokens: int) -> int:
    """Return the bytes of the keys and values of one slot."""
    text = model.config.get_text_config()
    head_width = model.model.language_model.layers[0].self_attn.head_dim
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width * model.dtype.itemsize
    return per_token * round_capacity(num_tokens)


def prefill_bytes(model: Any, *, num_prompts: int, num_prompt_tokens: int) -> int:
    """Return about how many bytes the reading of prompts takes at its widest, images included.

    The text model is widest in its feed-forward layers: gate and up side by side, their activation, their product, and
    the residual stream before and after. The vision tower keeps what each of its layers gives. Image tokens are
    counted as if a prompt were nothing else.
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    num_tokens = num_prompts * num_prompt_tokens
    text_width = 4 * text.hidden_size + 4 * text.intermediate_size
    image_width = (vision.num_hidden_layers + 8) * vision.hidden_size
    logits = 2 * num_prompts * text.vocab_size
    return (num_tokens * (text_width + image_width) + logits) * model.dtype.itemsize

"""One decoding step of a Llama-like text model over the slot cache, in as few operations as it takes.

A step is short: what transformers' forward spends beside its matrix products (masks, wrappers, one call per small
operation) is a third of it on a CPU, and more on a GPU that waits for its launches. The weights stay the model's own.
"""

# B rows in use, T cached tokens, V vocabulary, W model width, H query heads, K key heads, D head width, F hidden width

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from captioning.slots import SlotCache

# Same layers under other names: Vicuna and Yi are Llamas; LLaVA-NeXT also comes with Mistral and Qwen2.
TEXT_MODELS = ("LlamaModel", "MistralModel", "Qwen2Model")
# Others stretch positions by the length of what was read so far.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class _Layer:
    # `fused` weights are [rows of several projections, W]; the projections themselves are views of them.
    attention_norm: Any
    query_key_value: Tensor
    query_key_value_bias: Tensor | None
    output: Any
    mlp_norm: Any
    gate_up: Tensor
    down: Any


class LlamaStep:
    """Appends one token to each row of a slot cache and gives the logits of the next."""

    def __init__(self, model: Any) -> None:
        """Take the text model of a vision-language model and lay its projections side by side, in place.

        Raises:
            ValueError: its layers are not Llama's; names the class.
        """
        text_model = model.model.language_model
        config = model.config.get_text_config()
        require_llama(text_model, config)
        attention = text_model.layers[0].self_attn
        self._head_width = attention.head_dim
        self._num_heads = config.num_attention_heads
        self._num_key_heads = config.num_key_value_heads
        self._scale = attention.scaling
        self._embed, self._norm, self._lm_head = text_model.embed_tokens, text_model.norm, model.lm_head
        self._layers = [_fuse(layer) for layer in text_model.layers]
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        cos, sin = text_model.rotary_emb(self._embed.weight[:1], positions)  # [1, positions, D]
        half = self._head_width // 2
        # x * cos + rotate_half(x) * sin, where rotate_half is a roll by half and a change of sign.
        self._cos = cos[0]
        self._signed_sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def __call__(self, token_ids: Tensor, lengths: Tensor, cache: SlotCache, *, longest: int) -> Tensor:
        """Feed `token_ids` [B] at positions `lengths` [B], of which `longest` is the largest; returns logits [B, V]."""
        num_rows = len(token_ids)
        cos, sin = self._cos[lengths][:, None], self._signed_sin[lengths][:, None]  # [B, 1, D]
        hidden = self._embed(token_ids)  # [B, W]
        columns = torch.arange(longest + 1, device=lengths.device)  # [T]
        mask = hidden.new_zeros(num_rows, 1, 1, longest + 1)
        mask.masked_fill_((columns > lengths[:, None])[:, None, None], -torch.inf)
        places = cache.places(lengths)
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            mixed = functional.linear(
                _normalise(hidden, layer.attention_norm), layer.query_key_value, layer.query_key_value_bias
            )
            mixed = mixed.view(num_rows, -1, self._head_width)  # [B, H + 2 K, D]
            turned = mixed[:, : -self._num_key_heads]
            turned = torch.addcmul(turned * cos, turned.roll(self._head_width // 2, -1), sin)  # [B, H + K, D]
            self._write(keys, places, turned[:, self._num_heads :])
            self._write(values, places, mixed[:, -self._num_key_heads :])
            attended = functional.scaled_dot_product_attention(
                turned[:, : self._num_heads, None],  # [B, H, 1, D]
                keys[:num_rows, :, : longest + 1],
                values[:num_rows, :, : longest + 1],
                attn_mask=mask,
                scale=self._scale,
                enable_gqa=self._num_heads != self._num_key_heads,
            )
            hidden = hidden + layer.output(attended.reshape(num_rows, -1))
            gate, up = functional.linear(_normalise(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)  # [B, F]
            hidden = hidden + layer.down(functional.silu(gate) * up)
        return self._lm_head(_normalise(hidden, self._norm))

    def _write(self, cached: Tensor, places: Tensor, new: Tensor) -> None:
        cached.view(-1, self._head_width).index_copy_(0, places, new.reshape(-1, self._head_width))


def require_llama(text_model: Any, config: Any) -> None:
    """Refuse a text model whose step this file does not compute."""
    name = type(text_model).__name__
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if name not in TEXT_MODELS or rope_type not in FIXED_ROPE_TYPES or sliding or config.hidden_act != "silu":
        raise ValueError(
            f"captioning.model has a {name} (rope {rope_type}, sliding window {sliding}, {config.hidden_act}) as text "
            f"model; {', '.join(TEXT_MODELS)} with full attention can be decoded in process, others by "
            'captioning.engine = "openai"'
        )


def _normalise(hidden: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _fuse(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    has_bias = projections[0].bias is not None
    return _Layer(
        attention_norm=layer.input_layernorm,
        query_key_value=_lay_side_by_side(projections),
        query_key_value_bias=torch.cat([projection.bias for projection in projections]) if has_bias else None,
        output=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        gate_up=_lay_side_by_side([mlp.gate_proj, mlp.up_proj]),
        down=mlp.down_proj,
    )


def _lay_side_by_side(projections: list[Any]) -> Tensor:
    # The projections become views of the whole, so that nothing is held twice.
    fused = torch.cat([projection.weight.detach() for projection in projections])
    for projection, rows in zip(projections, fused.split([len(p.weight) for p in projections]), strict=True):
        projection.weight.data = rows
    return fused

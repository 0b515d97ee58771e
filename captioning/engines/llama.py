"""The Llama-like text model of a LLaVA over the slot cache: prompts of any lengths packed, then a token at a time.

Prompts are laid one behind the other, so that there is no padding to be masked or paid for, and their keys go straight
into the cache. A step is short: what transformers' forward spends beside its matrix products (masks, wrappers, one call
per small operation) is a third of it on a CPU, and more on a GPU that waits for its launches. The weights stay the
model's own.
"""

# B rows in use, R prompts, N packed tokens, L tokens of one prompt, T cached tokens, V vocabulary
# W model width, H query heads, K key heads, D head width, F hidden width

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from captioning.engines.slots import SlotCache
from errors import UserError

# Same layers under other names: Vicuna and Yi are Llamas; LLaVA-NeXT also comes with Mistral and Qwen2.
TEXT_MODELS = ("LlamaModel", "MistralModel", "Qwen2Model")
# Others stretch positions by the length of what was read so far.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Takes the layer's number and queries [N, H, D], keys and values [N, K, D]; gives what was attended [N, H * D].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


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


class LlamaForward:
    """Reads prompts into a slot cache, and appends one token to each of its rows; gives the logits of the next."""

    def __init__(self, model: Any) -> None:
        """Take a vision-language model and lay the projections of its text model side by side, in place.

        Raises:
            UserError: its layers are not Llama's; names the class.
        """
        text_model, config = model.model.language_model, model.config.get_text_config()
        require_llama(text_model, config)
        self._model = model
        self._head_width = text_model.layers[0].self_attn.head_dim
        self._num_heads, self._num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self._scale = text_model.layers[0].self_attn.scaling
        self._embed, self._norm, self._lm_head = text_model.embed_tokens, text_model.norm, model.lm_head
        self._layers = [_fuse(layer) for layer in text_model.layers]
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        cos, sin = text_model.rotary_emb(self._embed.weight[:1], positions)  # [1, positions, D]
        half = self._head_width // 2
        # x * cos + rotate_half(x) * sin, where rotate_half is a roll by half and a change of sign.
        self._cos = cos[0]
        self._signed_sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def make_cache(self, num_slots: int) -> SlotCache:
        """Return an empty cache for this model."""
        like = self._embed.weight.new_empty(1, self._num_key_heads, 0, self._head_width)
        return SlotCache(num_layers=len(self._layers), num_slots=num_slots, like=like)

    def prefill(
        self, prompts: Sequence[Tensor], image_inputs: dict[str, Tensor], cache: SlotCache, *, first_slot: int
    ) -> Tensor:
        """Read `prompts`, ids [L] each, with their images into slots from `first_slot` on; returns logits [R, V]."""
        lengths = [len(prompt) for prompt in prompts]
        stops = list(itertools.accumulate(lengths))
        input_ids = torch.cat(list(prompts)).to(self._model.device)  # [N]
        positions = torch.cat([torch.arange(length) for length in lengths]).to(input_ids.device)
        last = len(self._layers) - 1

        def attend(number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            # In the last layer only the last token of each prompt asks.
            asking = [1] * len(lengths) if number == last else lengths
            answers = []
            for row, (query, key, value) in enumerate(
                zip(queries.split(asking), keys.split(lengths), values.split(lengths), strict=True)
            ):
                query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
                cache.store(number, first_slot + row, key, value)
                answers.append(self._attend(query[None], key[None], value[None], is_causal=query.shape[1] > 1))
            return torch.cat([answer[0].transpose(0, 1).flatten(1) for answer in answers])

        ends = torch.tensor(stops, device=input_ids.device) - 1
        return self._run(self._embed_images(input_ids, image_inputs), positions, attend, asking=ends)

    def step(self, token_ids: Tensor, lengths: Tensor, cache: SlotCache, *, longest: int) -> Tensor:
        """Feed `token_ids` [B] at positions `lengths` [B], of which `longest` is the largest; returns logits [B, V]."""
        num_rows = len(token_ids)
        hidden = self._embed(token_ids)  # [B, W]
        columns = torch.arange(longest + 1, device=lengths.device)  # [T]
        mask = hidden.new_zeros(num_rows, 1, 1, longest + 1)
        mask.masked_fill_((columns > lengths[:, None])[:, None, None], -torch.inf)
        places = cache.places(lengths)

        def attend(number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            cache.append(number, places, keys, values)
            cached = (
                cache.keys[number][:num_rows, :, : longest + 1],
                cache.values[number][:num_rows, :, : longest + 1],
            )
            return self._attend(queries[:, :, None], *cached, mask=mask).flatten(1)

        return self._run(hidden, lengths, attend, asking=None)

    def _embed_images(self, input_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        model, config = self._model, self._model.config
        hidden = self._embed(input_ids)  # [N, W]
        inputs = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in image_inputs.items()
        }
        features = model.model.get_image_features(
            **inputs,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output
        is_image = input_ids == config.image_token_id
        features = torch.cat(list(features)).to(hidden.dtype)
        assert len(features) == int(is_image.sum()), f"{int(is_image.sum())} image tokens, {len(features)} features"
        hidden[is_image] = features
        return hidden

    def _run(self, hidden: Tensor, positions: Tensor, attend: Attend, *, asking: Tensor | None) -> Tensor:
        """Run all layers over `hidden` [N, W]; logits of the rows `asking`, or of all."""
        cos, sin = self._cos[positions][:, None], self._signed_sin[positions][:, None]  # [N, 1, D]
        for number, layer in enumerate(self._layers):
            mixed = functional.linear(
                _normalise(hidden, layer.attention_norm), layer.query_key_value, layer.query_key_value_bias
            ).view(len(hidden), -1, self._head_width)  # [N, H + 2 K, D]
            turned = mixed[:, : -self._num_key_heads]
            turned = torch.addcmul(turned * cos, turned.roll(self._head_width // 2, -1), sin)  # [N, H + K, D]
            queries, keys, values = (
                turned[:, : self._num_heads],
                turned[:, self._num_heads :],
                mixed[:, -self._num_key_heads :],
            )
            if asking is not None and layer is self._layers[-1]:
                hidden, queries = hidden[asking], queries[asking]
            hidden = hidden + layer.output(attend(number, queries, keys, values))
            gate, up = functional.linear(_normalise(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)  # [N, F]
            hidden = hidden + layer.down(functional.silu(gate) * up)
        return self._lm_head(_normalise(hidden, self._norm))

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self._scale,
            enable_gqa=self._num_heads != self._num_key_heads,
        )


def require_llama(text_model: Any, config: Any) -> None:
    """Refuse a text model whose layers this file does not compute."""
    name = type(text_model).__name__
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if name not in TEXT_MODELS or rope_type not in FIXED_ROPE_TYPES or sliding or config.hidden_act != "silu":
        raise UserError(
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
        query_key_value_bias=torch.cat([projection.bias.detach() for projection in projections]) if has_bias else None,
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

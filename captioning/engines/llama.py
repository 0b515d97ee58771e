"""The Llama-like text model of a LLaVA over the slot cache: prompts of any lengths packed, then a token at a time.

Prompts are laid one behind the other, so that there is no padding to be masked or paid for, and their keys go straight
into the cache. A step is short: what transformers' forward spends beside its matrix products (masks, wrappers, one call
per small operation) is a third of it on a CPU, and more on a GPU that waits for its launches. The weights stay the
model's own.
"""

# B rows in use, R prompts, N packed tokens, L tokens of one prompt, T cached tokens, V vocabulary
# W model width, H query heads, K key heads, D head width, F hidden width

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

# Takes the layer's number and its mixed queries, keys and values [N, H + 2 K, D], puts the last two into the cache, and
# gives the turned queries [N, H, D].
Place = Callable[[int, Tensor], Tensor]
# The same, and gives what was attended [N, H * D], of the tokens that ask.
Attend = Callable[[int, Tensor], Tensor]
# On a GPU padded prompts have one of few lengths: attention kernels are planned anew for each.
PROMPT_MULTIPLE = 64


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
        self.model = model
        self._head_width = text_model.layers[0].self_attn.head_dim
        self._num_heads, self._num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self._scale = text_model.layers[0].self_attn.scaling
        self._embed, self._norm, self._lm_head = text_model.embed_tokens, text_model.norm, model.lm_head
        self._layers = [_fuse(layer) for layer in text_model.layers]
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        cos, sin = text_model.rotary_emb(self._embed.weight[:1], positions)  # [1, positions, D]
        half = self._head_width // 2
        # x * cos + rotate_half(x) * sin, where rotate_half is a roll by half and a change of sign.
        self._cos = cos[0].contiguous()
        self._signed_sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and the cache."""
        return self._embed.weight.dtype

    @property
    def vocabulary(self) -> int:
        """V, the logits of a token."""
        return self._lm_head.weight.shape[0]

    def make_cache(self, num_slots: int) -> SlotCache:
        """Return an empty cache for this model."""
        like = self._embed.weight.new_empty(1, self._num_key_heads, 0, self._head_width)
        return SlotCache(num_layers=len(self._layers), num_slots=num_slots, like=like)

    def prefill(
        self, prompts: Sequence[Tensor], image_inputs: dict[str, Tensor], cache: SlotCache, *, first_slot: int
    ) -> Tensor:
        """Read `prompts`, ids [L] each, with their images into slots from `first_slot` on; returns logits [R, V].

        Only attention sees padded prompts: what stands behind a prompt's end is in the future of all its tokens.
        """
        pack = _Pack(prompts, first_slot=first_slot, multiple=PROMPT_MULTIPLE if self.device.type == "cuda" else 1)
        slots, positions, ends, places = (
            send(indices, self.device) for indices in (pack.slots, pack.positions, pack.ends, pack.places)
        )
        sources = send(pack.sources, self.device) if pack.is_padded else None
        place = self._place_on_gpu if self.device.type == "cuda" else self._place_eagerly
        place_layer = place(slots, positions, cache)
        last = len(self._layers) - 1
        in_use = slice(first_slot, first_slot + len(prompts))

        def attend(number: int, mixed: Tensor) -> Tensor:
            queries = place_layer(number, mixed)  # [N, H, D]
            if number == last:
                return self._attend_last(queries[ends], cache, number, in_use, positions[ends], pack.longest)
            queries = queries if sources is None else queries[sources]
            answers = self._attend(
                queries.view(len(prompts), pack.padded_length, self._num_heads, self._head_width).transpose(1, 2),
                cache.keys[number][in_use, :, : pack.padded_length],
                cache.values[number][in_use, :, : pack.padded_length],
                is_causal=True,
            )
            answers = answers.transpose(1, 2).flatten(2).flatten(0, 1)  # [R * P, H * D]
            return answers if sources is None else answers[places]

        hidden = self._embed_images(torch.cat(list(prompts)), image_inputs)
        return self._run(hidden, attend, asking=ends)

    def ask(self, shared: Tensor, questions: Sequence[Tensor], image_inputs: dict[str, Tensor]) -> Tensor:
        """Read the ids [L] of `questions`, each behind the same `shared` ones and blind to the others.

        What they share, an image as a rule, is read once. Returns logits [R, V] of what follows each question; no cache
        is kept.
        """
        lengths = torch.tensor([len(question) for question in questions])
        own = torch.cat([torch.arange(length) for length in lengths.tolist()])
        positions = torch.cat([torch.arange(len(shared)), len(shared) + own])  # [N]
        segments = torch.cat([torch.zeros(len(shared)), torch.arange(1, len(lengths) + 1).repeat_interleave(lengths)])
        is_before = torch.ones(len(segments), len(segments), dtype=torch.bool).tril()
        is_seen = send(((segments[:, None] == segments) | (segments == 0)) & is_before, self.device)  # [N, N]
        ends = send(len(shared) + lengths.cumsum(0) - 1, self.device)
        cos, sin = self._rotary(send(positions, self.device))
        last = len(self._layers) - 1

        def attend(number: int, mixed: Tensor) -> Tensor:
            queries, keys, values = self._turn(mixed, cos, sin)
            asking = slice(None) if number < last else ends
            heads = [part.transpose(0, 1)[None] for part in (queries[asking], keys, values)]  # [1, H, N, D]
            return self._attend(*heads, mask=is_seen[asking])[0].transpose(0, 1).flatten(1)

        hidden = self._embed_images(torch.cat([shared, *questions]), image_inputs)
        return self._run(hidden, attend, asking=ends)

    def step(self, token_ids: Tensor, lengths: Tensor, cache: SlotCache, *, longest: int) -> Tensor:
        """Feed `token_ids` [B] at positions `lengths` [B], of which `longest` is the largest; returns logits [B, V].

        On a GPU nothing depends on `longest`: each row is read to its own length.
        """
        attend = self._attend_on_gpu if self.device.type == "cuda" else self._attend_eagerly
        return self._run(self._embed(token_ids), attend(lengths, cache, longest), asking=None)

    def _place_on_gpu(self, slots: Tensor, positions: Tensor, cache: SlotCache) -> Place:
        # Triton is where CUDA is.
        from captioning.engines.cache_kernels import turn_and_place

        def place(number: int, mixed: Tensor) -> Tensor:
            keys, values = cache.keys[number], cache.values[number]
            tables = {"cos": self._cos, "signed_sin": self._signed_sin}
            return turn_and_place(mixed, slots, positions, keys, values, **tables, num_heads=self._num_heads)

        return place

    def _place_eagerly(self, slots: Tensor, positions: Tensor, cache: SlotCache) -> Place:
        places = cache.places(slots, positions)
        cos, sin = self._rotary(positions)

        def place(number: int, mixed: Tensor) -> Tensor:
            queries, keys, values = self._turn(mixed, cos, sin)
            cache.append(number, places, keys, values)
            return queries

        return place

    def _attend_on_gpu(self, lengths: Tensor, cache: SlotCache, longest: int) -> Attend:
        from captioning.engines.cache_kernels import append_and_attend

        def attend(number: int, mixed: Tensor) -> Tensor:
            return append_and_attend(
                mixed,
                lengths,
                cache.keys[number],
                cache.values[number],
                cos=self._cos,
                signed_sin=self._signed_sin,
                num_heads=self._num_heads,
                scale=self._scale,
            )

        return attend

    def _attend_eagerly(self, lengths: Tensor, cache: SlotCache, longest: int) -> Attend:
        place_layer = self._place_eagerly(torch.arange(len(lengths), device=lengths.device), lengths, cache)
        in_use = slice(0, len(lengths))

        def attend(number: int, mixed: Tensor) -> Tensor:
            queries = place_layer(number, mixed)
            return self._attend_last(queries, cache, number, in_use, lengths, longest + 1)

        return attend

    def _attend_last(
        self, queries: Tensor, cache: SlotCache, number: int, in_use: slice, places: Tensor, num_tokens: int
    ) -> Tensor:
        """Let one query [B, H, D] per slot see the tokens up to its own at `places` [B], of `num_tokens` read."""
        columns = torch.arange(num_tokens, device=places.device)  # [T]
        mask = queries.new_zeros(len(queries), 1, 1, num_tokens)
        mask.masked_fill_((columns > places[:, None])[:, None, None], -torch.inf)
        keys, values = cache.keys[number][in_use, :, :num_tokens], cache.values[number][in_use, :, :num_tokens]
        return self._attend(queries[:, :, None], keys, values, mask=mask).flatten(1)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions][:, None], self._signed_sin[positions][:, None]  # [N, 1, D]

    def _turn(self, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split `mixed` into queries [N, H, D], keys and values [N, K, D], the first two turned by their positions."""
        turned = mixed[:, : -self._num_key_heads]
        turned = torch.addcmul(turned * cos, turned.roll(self._head_width // 2, -1), sin)  # [N, H + K, D]
        return turned[:, : self._num_heads], turned[:, self._num_heads :], mixed[:, -self._num_key_heads :]

    def _embed_images(self, input_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        model, config = self.model, self.model.config
        hidden = self._embed(send(input_ids, self.device))  # [N, W]
        inputs = {
            name: send(tensor, self.device).to(model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in image_inputs.items()
        }
        features = model.model.get_image_features(
            **inputs,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output
        features = torch.cat(list(features)).to(hidden.dtype)
        # Found on the CPU: the device is not waited for.
        places = (input_ids == config.image_token_id).nonzero()[:, 0]
        assert len(features) == len(places), f"{len(places)} image tokens, {len(features)} features"
        return hidden.index_copy_(0, send(places, self.device), features)

    def _run(self, hidden: Tensor, attend: Attend, *, asking: Tensor | None) -> Tensor:
        """Run all layers over `hidden` [N, W]; logits of the rows `asking`, or of all."""
        for number, layer in enumerate(self._layers):
            mixed = functional.linear(
                _normalise(hidden, layer.attention_norm), layer.query_key_value, layer.query_key_value_bias
            ).view(len(hidden), -1, self._head_width)  # [N, H + 2 K, D]
            attended = attend(number, mixed)
            if asking is not None and layer is self._layers[-1]:
                # In the last layer only the last token of each prompt asks.
                hidden = hidden[asking]
            hidden = hidden + layer.output(attended)
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


class _Pack:
    """Where the tokens of some prompts stand: packed one behind the other, padded to one length, and in the cache.

    Attributes:
        slots, positions: of each packed token, [N].
        ends: where the last token of each prompt stands among the packed, [R].
        places: where each packed token stands among the padded, [N].
        sources: which packed token stands at each padded place, [R * P]; any, behind the end of a prompt.
        longest, padded_length: of the longest prompt, and P.
    """

    def __init__(self, prompts: Sequence[Tensor], *, first_slot: int, multiple: int) -> None:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        rows = torch.arange(len(prompts)).repeat_interleave(lengths)  # [N]
        self.longest = int(lengths.max())
        self.padded_length = -(-self.longest // multiple) * multiple
        self.is_padded = bool((lengths != self.padded_length).any())
        self.ends = lengths.cumsum(0) - 1
        starts = self.ends + 1 - lengths
        self.positions = torch.arange(len(rows)) - starts[rows]
        self.slots = first_slot + rows
        self.places = rows * self.padded_length + self.positions
        columns = torch.arange(self.padded_length).minimum(lengths[:, None] - 1)  # [R, P]
        self.sources = (starts[:, None] + columns).flatten()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on `device`, without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def require_llama(text_model: Any, config: Any) -> None:
    """Refuse a text model whose layers this file does not compute."""
    name = type(text_model).__name__
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if name not in TEXT_MODELS or rope_type not in FIXED_ROPE_TYPES or sliding or config.hidden_act != "silu":
        raise UserError(
            f"captioning.model has a {name} (rope {rope_type}, sliding window {sliding}, {config.hidden_act}) as text "
            f"model; {', '.join(TEXT_MODELS)} with full attention are decoded by "
            'captioning.engine = "transformers", others by "generate"'
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

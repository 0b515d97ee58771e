"""Continuous batching: every row decodes its own caption, and a finished row makes room for the next image.

`model.generate` keeps a batch until its longest caption ends. Here finished rows are replaced from the queue, and when
the queue is empty the batch shrinks. Which rows share a batch depends only on the order of the prompts, never on time.
"""

# B rows in use, R prompts admitted, L prompt tokens, T cached tokens, V vocabulary

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from captioning.engines.llama import LlamaForward
from captioning.engines.protocol import FinishReason
from errors import UserError

# A prefill waits for this share of the slots to be free.
REFILL_DIVISOR = 8
IMAGE_INPUTS = ("pixel_values", "image_sizes")


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A tokenized request: `input_ids` int64 [L], image tokens expanded, and the processor's tensors of one image."""

    input_ids: Tensor
    image_inputs: dict[str, Tensor]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """The new tokens of one prompt, without the end token."""

    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How to decode: at most `num_slots` rows at a time; `temperature` 0 is greedy."""

    num_slots: int
    max_new_tokens: int
    temperature: float
    end_token_ids: frozenset[int]


@dataclass(kw_only=True)
class _Row:
    # `length` counts the tokens in the cache; the last of `token_ids` is not among them, it is fed next.
    index: int
    length: int
    uniforms: list[float]
    # Tokens of prompt and caption, bool [V]; None without a repetition penalty.
    seen: Tensor | None
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


class ContinuousDecoder:
    """Continues prompts of a vision-language model of transformers whose text model is Llama-like."""

    def __init__(self, forward: LlamaForward, settings: DecodingSettings) -> None:
        self._forward = forward
        self._settings = settings
        self._cache = forward.make_cache(settings.num_slots)
        # Prompts are admitted some at a time: one by one would starve the device.
        self._refill = max(1, settings.num_slots // REFILL_DIVISOR)
        self._penalty = 1.0
        self._rows: list[_Row] = []
        self._results: list[Continuation | None] = []

    @torch.inference_mode()
    def decode(self, prompts: Iterable[TokenizedPrompt], *, repetition_penalty: float = 1.0) -> list[Continuation]:
        """Return the continuation of every prompt, in order; prompts are taken as slots become free.

        `repetition_penalty` is that of transformers (arXiv 1909.05858): logits of tokens that stand in the prompt or in
        the caption so far are divided by it where they are positive, and multiplied where they are negative.

        Raises:
            UserError: the model's logits are not finite.
        """
        queue = iter(prompts)
        self._penalty = repetition_penalty
        self._rows, self._results = [], []
        while self._admit(queue) or self._rows:
            if self._rows:
                self._step()
        results = [result for result in self._results if result is not None]
        assert len(results) == len(self._results), "every prompt is continued"
        return results

    def _admit(self, queue: Iterator[TokenizedPrompt]) -> bool:
        if self._settings.num_slots - len(self._rows) < self._refill:
            return False
        admitted = list(islice(queue, self._refill))
        if admitted:
            self._prefill(admitted)
        return bool(admitted)

    def _prefill(self, prompts: Sequence[TokenizedPrompt]) -> None:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        self._cache.reserve(max(lengths) + self._settings.max_new_tokens)
        images = {name: _stack([prompt.image_inputs[name] for prompt in prompts]) for name in prompts[0].image_inputs}
        input_ids = [prompt.input_ids for prompt in prompts]
        logits = self._forward.prefill(input_ids, images, self._cache, first_slot=len(self._rows))
        if not torch.isfinite(logits).all():
            raise UserError(f"captioning.dtype {logits.dtype}: the model's logits are not finite")
        rows = [
            _Row(
                index=len(self._results) + number,
                length=length,
                uniforms=self._draw_uniforms(prompt.seed),
                seen=self._mark_seen(prompt, logits),
            )
            for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        self._rows += rows
        self._results += [None] * len(rows)
        self._append(rows, self._choose(logits, rows))

    def _step(self) -> None:
        rows, device = self._rows, self._cache.keys[0].device
        token_ids = torch.tensor([row.token_ids[-1] for row in rows], device=device)  # [B]
        lengths = [row.length for row in rows]
        positions = torch.tensor(lengths, device=device)
        logits = self._forward.step(token_ids, positions, self._cache, longest=max(lengths))
        for row in rows:
            row.length += 1
        self._append(rows, self._choose(logits, rows))

    def _mark_seen(self, prompt: TokenizedPrompt, logits: Tensor) -> Tensor | None:
        if self._penalty == 1.0:
            return None
        seen = torch.zeros_like(logits[0], dtype=torch.bool)
        seen[prompt.input_ids.to(seen.device)] = True
        return seen

    def _penalise(self, logits: Tensor, rows: Sequence[_Row]) -> Tensor:
        marks = [row.seen for row in rows if row.seen is not None]
        if not marks:
            return logits
        penalised = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
        return torch.where(torch.stack(marks), penalised, logits)

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> list[int]:
        logits = self._penalise(logits, rows)
        if self._settings.temperature == 0:
            return logits.argmax(-1).tolist()
        cumulative = torch.softmax(logits.double() / self._settings.temperature, -1).cumsum(-1)  # [B, V]
        uniforms = cumulative.new_tensor([row.uniforms[len(row.token_ids)] for row in rows])
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)  # [B, 1]
        return tokens[:, 0].clamp(max=logits.shape[-1] - 1).tolist()

    def _draw_uniforms(self, seed: int) -> list[float]:
        if self._settings.temperature == 0:
            return []
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self._settings.max_new_tokens, generator=generator, dtype=torch.float64).tolist()

    def _append(self, rows: Sequence[_Row], tokens: Sequence[int]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            is_end = token in self._settings.end_token_ids
            if not is_end:
                row.token_ids.append(token)
                if row.seen is not None:
                    row.seen[token] = True
            if is_end or len(row.token_ids) == self._settings.max_new_tokens:
                row.is_finished = True
                reason: FinishReason = "stop" if is_end else "length"
                self._results[row.index] = Continuation(token_ids=row.token_ids, finish_reason=reason)
        self._close_gaps()

    def _close_gaps(self) -> None:
        # The rows in use are always the first slots: the last unfinished row moves into a finished one's place.
        rows = self._rows
        slot = 0
        while slot < len(rows):
            if not rows[slot].is_finished:
                slot += 1
                continue
            last = rows.pop()
            if slot < len(rows) and not last.is_finished:
                self._cache.move(len(rows), slot, last.length)
                rows[slot] = last


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    # LLaVA-NeXT cuts an image into tiles [1, tiles, 3, height, width]; images with fewer are padded with empty ones.
    if tensors[0].ndim < 5:
        return torch.cat(list(tensors))
    most = max(tensor.shape[1] for tensor in tensors)
    padding = [(0, 0) * (tensor.ndim - 2) + (0, most - tensor.shape[1]) for tensor in tensors]
    return torch.cat([torch.nn.functional.pad(tensor, pad) for tensor, pad in zip(tensors, padding, strict=True)])

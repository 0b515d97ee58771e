"""Continuous batching: every row decodes its own caption, and a finished row makes room for the next image.

`model.generate` keeps a batch until its longest caption ends. Here finished rows are replaced from the queue, and when
the queue is empty the batch shrinks. Which rows share a batch depends only on the order of the prompts, never on time.

Tokens are chosen, ends are seen and lengths advance where the model is (`RowStates`). On a GPU the host looks at the
rows every few steps and has the next step launched before it looks, so that neither waits for the other.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from captioning.engines.choosing import require_finite
from captioning.engines.graphs import StepGraphs, padded_rows
from captioning.engines.llama import LlamaForward
from captioning.engines.rows import Continuation, DecodingSettings, Note, RowStates, TokenizedPrompt

# A prefill waits for this share of the slots to be free.
REFILL_DIVISOR = 8
# Tokens read at a time, about: more are not faster, and their activations take memory.
PREFILL_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When the host looks at the rows: after `num_steps` more, the last `num_ahead` of which are not waited for.

    `pads_rows`: whether steps carry one of few numbers of rows, as graphs need it.
    """

    num_steps: int
    num_ahead: int
    pads_rows: bool


# On a CPU a look is free and a row that is done costs.
CPU_PACE = Pace(num_steps=1, num_ahead=0, pads_rows=False)
GPU_PACE = Pace(num_steps=4, num_ahead=1, pads_rows=True)


@dataclass(kw_only=True)
class _Row:
    # `length` counts the tokens in the cache; of a row that is done, more.
    index: int
    length: int


class ContinuousDecoder:
    """Continues prompts of a vision-language model of transformers whose text model is Llama-like."""

    def __init__(self, forward: LlamaForward, settings: DecodingSettings, *, pace: Pace | None = None) -> None:
        """Take a model and how to decode; `pace` is that of the device where it is None."""
        self._forward = forward
        self._settings = settings
        self._device = forward.device
        is_cuda = self._device.type == "cuda"
        self._pace = pace or (GPU_PACE if is_cuda else CPU_PACE)
        self._cache = forward.make_cache(settings.num_slots)
        self._states = RowStates(settings, vocabulary=forward.vocabulary, device=self._device)
        self._graphs = StepGraphs() if is_cuda else None
        # Prompts are admitted some at a time: one by one would starve the device.
        self._refill = max(1, settings.num_slots // REFILL_DIVISOR)
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
        self._rows, self._results = [], []
        with torch.cuda.device(self._device) if self._graphs is not None else nullcontext():
            self._states.start(penalty=repetition_penalty)
            while self._fill(queue):
                self._advance()
        results = [result for result in self._results if result is not None]
        assert len(results) == len(self._results), "every prompt is continued"
        return results

    def _fill(self, queue: Iterator[TokenizedPrompt]) -> bool:
        """Admit prompts while there is room for some; returns whether any row is in use."""
        while self._settings.num_slots - len(self._rows) >= self._refill:
            admitted = list(islice(queue, self._refill))
            for pack in _packs(admitted):
                self._prefill(pack)
            if not admitted:
                break
        return bool(self._rows)

    def _prefill(self, prompts: Sequence[TokenizedPrompt]) -> None:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        if self._cache.reserve(max(lengths) + self._settings.max_new_tokens) and self._graphs is not None:
            self._graphs.forget()
        images = {name: _stack([prompt.image_inputs[name] for prompt in prompts]) for name in prompts[0].image_inputs}
        first = len(self._rows)
        input_ids = [prompt.input_ids for prompt in prompts]
        logits = self._forward.prefill(input_ids, images, self._cache, first_slot=first)
        indices = range(len(self._results), len(self._results) + len(prompts))
        self._states.admit(prompts, logits, first=first, limits=[self._limit(index) for index in indices])
        self._rows += [_Row(index=index, length=length) for index, length in zip(indices, lengths, strict=True)]
        self._results += [None] * len(prompts)

    def _limit(self, index: int) -> int:
        """Return the new tokens of a prompt at most, `index` its place in the queue."""
        return self._settings.max_new_tokens

    def _advance(self) -> None:
        """Take the steps up to the next look at the rows, and give the slots of finished ones back."""
        note = None
        for number in range(self._pace.num_steps):
            if number == self._pace.num_steps - self._pace.num_ahead:
                note = self._states.note()
            self._launch()
        self._collect(note or self._states.note())

    def _launch(self) -> None:
        num_rows = len(self._rows)
        if self._pace.pads_rows:
            num_rows = padded_rows(num_rows, num_slots=self._settings.num_slots)
        if self._graphs is not None:
            self._graphs.run(self._step, num_rows, setting=self._states.penalty)
        else:
            self._step(num_rows)
        for row in self._rows:
            row.length += 1

    def _step(self, num_rows: int) -> None:
        states = self._states
        longest = min(max(row.length for row in self._rows), self._cache.capacity - 1)
        logits = self._forward.step(states.tokens[:num_rows], states.lengths[:num_rows], self._cache, longest=longest)
        states.advance(logits)

    def _collect(self, note: Note) -> None:
        is_done, is_finite = note.wait()
        require_finite(is_finite, self._forward.dtype)
        is_done = is_done[: len(self._rows)]
        for slot, row in enumerate(self._rows):
            if is_done[slot]:
                self._results[row.index] = note.continuation(slot)
        if any(is_done):
            self._close_gaps(is_done)

    def _close_gaps(self, is_done: list[bool]) -> None:
        # The rows in use are always the first slots: the last unfinished rows move into the finished ones' places.
        num_left = is_done.count(False)
        targets = [slot for slot in range(num_left) if is_done[slot]]
        sources = [slot for slot in range(len(is_done) - 1, num_left - 1, -1) if not is_done[slot]]
        if sources:
            longest = min(max(self._rows[slot].length for slot in sources), self._cache.capacity)
            self._cache.move(*self._states.move(sources, targets), longest=longest)
        for source, target in zip(sources, targets, strict=True):
            self._rows[target] = self._rows[source]
        del self._rows[num_left:]
        self._states.release(num_left)


def _packs(prompts: Sequence[TokenizedPrompt]) -> Iterator[list[TokenizedPrompt]]:
    """Cut prompts into packs of `PREFILL_TOKENS` at most, or of one prompt."""
    pack: list[TokenizedPrompt] = []
    num_tokens = 0
    for prompt in prompts:
        if pack and num_tokens + len(prompt.input_ids) > PREFILL_TOKENS:
            yield pack
            pack, num_tokens = [], 0
        pack.append(prompt)
        num_tokens += len(prompt.input_ids)
    if pack:
        yield pack


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    # LLaVA-NeXT cuts an image into tiles [1, tiles, 3, height, width]; images with fewer are padded with empty ones.
    if tensors[0].ndim < 5:
        return torch.cat(list(tensors))
    most = max(tensor.shape[1] for tensor in tensors)
    padding = [(0, 0) * (tensor.ndim - 2) + (0, most - tensor.shape[1]) for tensor in tensors]
    return torch.cat([torch.nn.functional.pad(tensor, pad) for tensor, pad in zip(tensors, padding, strict=True)])

"""What each slot's caption has come to, kept and carried on where the model is, so that no token waits for the host."""

# S slots, B rows in use, M new tokens at most, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captioning.engines.choosing import draw_uniforms, mark_seen, penalise, sample_tokens
from captioning.engines.llama import send
from captioning.engines.protocol import FinishReason


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A tokenized request: `input_ids` int64 [L], image tokens expanded, and the processor's tensors of one image."""

    input_ids: Tensor
    image_inputs: dict[str, Tensor]
    seed: int


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How to decode: at most `num_slots` rows at a time; `temperature` 0 is greedy."""

    num_slots: int
    max_new_tokens: int
    temperature: float
    end_token_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """The new tokens of one prompt, without the end token."""

    token_ids: list[int]
    finish_reason: FinishReason


class RowStates:
    """The rows' last tokens, lengths and captions; a row that is done may be carried on without harm.

    Attributes:
        tokens: int64 [S], fed next; not in the cache yet.
        lengths: int64 [S], tokens in the cache.
        penalty: the repetition penalty; 1 is none.
    """

    def __init__(self, settings: DecodingSettings, *, vocabulary: int, device: torch.device) -> None:
        num_slots, longest = settings.num_slots, settings.max_new_tokens
        self._settings, self._vocabulary, self._device = settings, vocabulary, device
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.lengths = torch.zeros_like(self.tokens)
        self.penalty = 1.0
        self._counts, self._limits = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        self._is_done = torch.ones(num_slots, dtype=torch.bool, device=device)
        self._is_stopped = torch.zeros_like(self._is_done)
        # The last column takes what is of no caption.
        self._captions = self.tokens.new_zeros(num_slots, longest + 1)
        self._spare_column = torch.full((), longest, device=device)
        self._is_finite = torch.ones((), dtype=torch.bool, device=device)
        self._ends = torch.tensor(sorted(settings.end_token_ids), dtype=torch.int64, device=device)
        is_sampled = settings.temperature > 0
        self._uniforms = torch.zeros(num_slots, longest, dtype=torch.float64, device=device) if is_sampled else None
        # Tokens of prompt and caption, bool [S, V]; made with the first repetition penalty.
        self._seen: Tensor | None = None

    def start(self, *, penalty: float) -> None:
        """Forget all rows."""
        self.penalty = penalty
        if penalty != 1.0 and self._seen is None:
            self._seen = torch.zeros(len(self.tokens), self._vocabulary, dtype=torch.bool, device=self._device)
        self._is_finite.fill_(True)
        self.release(0)

    def release(self, first: int) -> None:
        """Free the slots from `first` on: whoever carries them on reads nothing."""
        self._is_done[first:] = True
        self.lengths[first:] = 0

    def admit(self, prompts: Sequence[TokenizedPrompt], logits: Tensor, *, first: int, limits: Sequence[int]) -> None:
        """Take prompts that were read to slots from `first` on and choose their first tokens by `logits` [R, V].

        `limits` are the new tokens of each at most.
        """
        slots = slice(first, first + len(prompts))
        self.lengths[slots] = self._send([len(prompt.input_ids) for prompt in prompts])
        self._limits[slots] = self._send(limits)
        self._counts[slots] = 0
        self._is_done[slots] = False
        self._is_stopped[slots] = False
        if self._uniforms is not None:
            drawn = [draw_uniforms(prompt.seed, self._settings.max_new_tokens) for prompt in prompts]
            self._uniforms[slots] = send(torch.stack(drawn), self._device)
        if self.penalty != 1.0:
            assert self._seen is not None
            said = torch.nn.utils.rnn.pad_sequence([prompt.input_ids for prompt in prompts], padding_value=-1).T
            is_seen = torch.zeros(len(prompts), self._vocabulary, dtype=torch.bool)
            mark_seen(is_seen, said, said >= 0)  # on the host, where nobody waits for the number of tokens
            self._seen[slots] = send(is_seen, self._device)
        self._is_finite.logical_and_(torch.isfinite(logits).all())
        self._append(logits, slots)

    def advance(self, logits: Tensor) -> None:
        """Append to the first B rows the tokens that `logits` [B, V] choose, after their last ones were cached."""
        rows = slice(0, len(logits))
        self.lengths[rows].add_(~self._is_done[rows])
        self._append(logits, rows)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copy rows to other slots; returns both as indices on the device."""
        indices = self._send([*sources, *targets])
        source, target = indices[: len(sources)], indices[len(sources) :]
        held = [self.tokens, self.lengths, self._counts, self._limits, self._is_done, self._is_stopped, self._captions]
        held += [tensor for tensor in (self._uniforms, self._seen) if tensor is not None]
        for tensor in held:
            tensor.index_copy_(0, target, tensor.index_select(0, source))
        return source, target

    def note(self) -> "Note":
        """Copy to the host what the rows have come to by now; nobody waits."""
        return Note((self._is_done, self._is_stopped, self._counts, self._captions, self._is_finite))

    def _append(self, logits: Tensor, rows: slice) -> None:
        tokens = self._choose(logits, rows)
        is_end = (tokens[:, None] == self._ends).any(-1)
        is_alive = ~self._is_done[rows]
        is_kept = is_alive & ~is_end
        columns = torch.where(is_kept, self._counts[rows], self._spare_column)
        self._captions[rows].scatter_(1, columns[:, None], tokens[:, None])
        self._counts[rows].add_(is_kept)
        self.tokens[rows].copy_(torch.where(is_kept, tokens, self.tokens[rows]))
        self._is_stopped[rows].logical_or_(is_alive & is_end)
        self._is_done[rows].logical_or_(is_end | (self._counts[rows] >= self._limits[rows]))
        if self.penalty != 1.0:
            assert self._seen is not None
            self._seen[rows].scatter_(1, tokens[:, None], True)

    def _choose(self, logits: Tensor, rows: slice) -> Tensor:
        if self.penalty != 1.0:
            assert self._seen is not None
            logits = penalise(logits, self._seen[rows], penalty=self.penalty)
        if self._uniforms is None:
            return logits.argmax(-1)
        columns = self._counts[rows].clamp(max=self._settings.max_new_tokens - 1)
        uniforms = self._uniforms[rows].gather(1, columns[:, None])  # [B, 1]
        return sample_tokens(logits, uniforms, temperature=self._settings.temperature)[:, 0]

    def _send(self, values: Sequence[int]) -> Tensor:
        return send(torch.tensor(values, dtype=torch.int64), self._device)


class Note:
    """What the rows had come to when the note was taken, on its way to the host."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        is_cuda = states[0].is_cuda
        self._held = [torch.empty(state.shape, dtype=state.dtype, pin_memory=is_cuda) for state in states]
        for held, state in zip(self._held, states, strict=True):
            held.copy_(state, non_blocking=True)
        self._event = None
        if is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[list[bool], bool]:
        """Wait for the copy; returns which slots are done, and whether all logits of prompts were finite."""
        if self._event is not None:
            self._event.synchronize()
        is_done, *_, is_finite = self._held
        return is_done.tolist(), bool(is_finite)

    def continuation(self, slot: int) -> Continuation:
        """Return the caption of a slot that is done."""
        _, is_stopped, counts, captions, _ = self._held
        token_ids = captions[slot, : int(counts[slot])].tolist()
        return Continuation(token_ids=token_ids, finish_reason="stop" if bool(is_stopped[slot]) else "length")

"""How the next token of each row is chosen: by that row alone, whatever it is batched with."""

# B rows of a batch, L prompt tokens, N new tokens, V vocabulary

import torch
from torch import Tensor
from transformers import LogitsProcessor

from errors import UserError


class RowChoice(LogitsProcessor):
    """Chooses, in `generate`, the next token of each row from nothing but that row: its logits, its tokens, its seed.

    Without temperature and penalty logits stay as they are. The penalty is that of transformers (arXiv 1909.05858), but
    for the padding: a row's captions must not depend on how long the others' prompts are.
    """

    def __init__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        uniforms: Tensor | None,
        temperature: float,
        repetition_penalty: float,
        dtype: torch.dtype,
    ) -> None:
        """Take the prompts [B, L], left-padded, and for a `temperature` uniforms [B, N], one per token to come.

        `dtype` is the model's.
        """
        self._dtype = dtype
        self._prompts, self._is_prompt = input_ids, attention_mask.bool()
        self._uniforms, self._temperature, self._penalty = uniforms, temperature, repetition_penalty
        self._seen: Tensor | None = None  # bool [B, V]
        self._num_chosen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits [B, V] from which `generate` takes the largest.

        Raises:
            UserError: those of the prompts are not finite.
        """
        if self._num_chosen == 0:
            require_finite(bool(torch.isfinite(scores.amax(-1)).all()), self._dtype)
        if self._penalty != 1.0:
            scores = self._penalise(input_ids, scores)
        if self._uniforms is not None:
            uniforms = self._uniforms[:, self._num_chosen, None]
            tokens = sample_tokens(scores, uniforms, temperature=self._temperature)
            scores = torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)
        self._num_chosen += 1
        return scores

    def _penalise(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros_like(scores, dtype=torch.bool)
            mark_seen(self._seen, self._prompts, self._is_prompt)
        else:
            self._seen.scatter_(1, input_ids[:, -1:], True)
        return penalise(scores, self._seen, penalty=self._penalty)


def mark_seen(is_seen: Tensor, prompts: Tensor, is_prompt: Tensor) -> None:
    """Mark in `is_seen` [B, V] the tokens of prompts [B, L] where `is_prompt` [B, L]; all on one device.

    Tokens of images may lie outside the vocabulary of words, and are never said.
    """
    rows, columns = torch.nonzero(is_prompt & (prompts < is_seen.shape[-1]), as_tuple=True)
    is_seen[rows, prompts[rows, columns]] = True


def require_finite(is_finite: bool, dtype: torch.dtype) -> None:
    """Refuse logits that are not finite.

    Raises:
        UserError: names the model's dtype, and others where they reach further.
    """
    if is_finite:
        return
    advice = "; bfloat16 and float32 reach further" if dtype == torch.float16 else "; the weights may be damaged"
    name = str(dtype).removeprefix("torch.")
    raise UserError(f"captioning.dtype {name}: the model's logits are not finite{advice}")


def penalise(logits: Tensor, is_seen: Tensor, *, penalty: float) -> Tensor:
    """Return the logits [B, V], in float32 as `generate` has them, with those of tokens `is_seen` [B, V] moved down."""
    logits = logits.float()
    return torch.where(is_seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float) -> Tensor:
    """Return the token of each row's softmax at `uniforms` [B, 1], int64 [B, 1].

    The inverse of the cumulative distribution, in float64 so that rare words keep their share.
    """
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)  # [B, V]
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return tokens.clamp(max=logits.shape[-1] - 1)


def draw_uniforms(seed: int, num: int) -> Tensor:
    """Return `num` numbers from [0, 1) in float64 that depend on the seed alone."""
    return torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

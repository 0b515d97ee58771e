"""What tokens mean to a caption: which end it, which no prompt may hold, and how it reads."""

import re
from collections.abc import Sequence
from typing import Any

from captioning.engines.protocol import Caption, FinishReason


def end_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a caption, as a model's settings for `generate` and its tokenizer name them."""
    configured = generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    ids = frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)
    assert ids, "the model knows how to end a caption"
    return ids


def special_tokens(tokenizer: Any, processor: Any) -> re.Pattern[str]:
    """Return what finds special tokens in a text: those of images, of beginnings and ends, of turns."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = {getattr(processor, "image_token", None), *added, *tokenizer.all_special_tokens} - {None}
    longest_first = sorted((str(token) for token in tokens if len(str(token)) > 1), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in longest_first))


def has_begin_token(tokenizer: Any, text: str) -> bool:
    """Whether a text brings the begin token itself, as that of some chat templates does."""
    begin = tokenizer.bos_token
    return begin is not None and text.startswith(begin)


def read_caption(tokenizer: Any, token_ids: Sequence[int], finish_reason: FinishReason) -> Caption:
    """Return new tokens, without the end token, as a caption."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True).strip()
    return Caption(text=text, num_tokens=len(token_ids), finish_reason=finish_reason)

"""Which tokens say something of a text: what a vocabulary lacks becomes one and the same unknown token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How SentencePiece and byte-level vocabularies write a space.
SPACES = str.maketrans({"▁": " ", "Ġ": " "})


@dataclass(frozen=True, kw_only=True)
class TokenKinds:
    """The tokens of a vocabulary by what they say of a text, as ids.

    Attributes:
        unread: those that say nothing: the one of what the vocabulary lacks, if there is one, and control tokens.
        num_added: control tokens that every text has.
        blank: those that say nothing, or stand for white space.
        wordless: those that say nothing, or have no letter or digit.
    """

    unread: frozenset[int]
    num_added: int
    blank: frozenset[int]
    wordless: frozenset[int]

    def num_unread(self, tokens: Sequence[int]) -> int:
        """Return how many tokens of a text are unknown, or control tokens that are not added to every text."""
        return max(0, sum(map(self.unread.__contains__, tokens)) - self.num_added)

    def is_unreadable(self, tokens: Sequence[int]) -> bool:
        """Whether nothing of a text is left: no sign at all, or where something was not read, no letter or digit."""
        return self.blank.issuperset(tokens) or (self.wordless.issuperset(tokens) and self.num_unread(tokens) > 0)


def token_kinds(tokenizer: Tokenizer | Any) -> TokenKinds:
    """Return what the tokens of a tokenizer say; of `tokenizers`, or of transformers with one of those within."""
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model["unk_id"] if model.get("unk_id") is not None else vocabulary.get(model.get("unk_token") or "")
    control = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    added = tokenizer.encode("").ids
    unread = control.union(added, () if unknown is None else (unknown,))
    shown = {number: token.translate(SPACES) for token, number in vocabulary.items()}
    return TokenKinds(
        unread=frozenset(unread),
        num_added=len(added),
        blank=frozenset(unread.union(number for number, text in shown.items() if not text.strip())),
        wordless=frozenset(unread.union(number for number, text in shown.items() if not any(map(str.isalnum, text)))),
    )

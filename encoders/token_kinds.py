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
        unknown: the one that stands for what the vocabulary lacks; None where there is none, as with bytes.
        control: those that begin, end or pad a text, or stand for something in it.
        num_added: control tokens that every text has.
        blank: those of white space alone.
        wordless: those without a letter or digit.
    """

    unknown: int | None
    control: frozenset[int]
    num_added: int
    blank: frozenset[int]
    wordless: frozenset[int]

    def num_unread(self, tokens: Sequence[int]) -> int:
        """Return how many tokens of a text are unknown, or control tokens that are not added to every text."""
        return max(0, sum(token == self.unknown or token in self.control for token in tokens) - self.num_added)

    def is_unreadable(self, tokens: Sequence[int]) -> bool:
        """Whether nothing of a text is left: no sign at all, or where something was not read, no letter or digit."""
        said = (token for token in tokens if token != self.unknown and token not in self.control)
        return (self.wordless if self.num_unread(tokens) else self.blank).issuperset(said)


def token_kinds(tokenizer: Tokenizer | Any) -> TokenKinds:
    """Return what the tokens of a tokenizer say; of `tokenizers`, or of transformers with one of those within."""
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model["unk_id"] if model.get("unk_id") is not None else vocabulary.get(model.get("unk_token") or "")
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    added = tokenizer.encode("").ids
    control = frozenset(special.union(added) - {unknown})
    shown = {number: token.translate(SPACES) for token, number in vocabulary.items()}
    return TokenKinds(
        unknown=unknown,
        control=control,
        num_added=len(added),
        blank=frozenset(number for number, text in shown.items() if not text.strip()),
        wordless=frozenset(number for number, text in shown.items() if not any(map(str.isalnum, text))),
    )

"""Which tokens say something of a text: what a vocabulary lacks becomes an unknown token, or is spelled in bytes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How SentencePiece writes a space, and a byte of what it lacks.
SPACE, BYTE = str.maketrans({"▁": " "}), re.compile("<0x[89A-F][0-9A-F]>")
REPLACEMENT = "\ufffd"  # where a token is no whole character


@dataclass(frozen=True, kw_only=True)
class TokenKinds:
    """The tokens of a vocabulary by what they say of a text, as ids.

    Attributes:
        unread: those that say nothing: the one of what the vocabulary lacks, if there is one, and control tokens.
        num_added: control tokens that every text has.
        single_bytes: single bytes of characters that have several. Two in a row spell a character of which the
            vocabulary has learned no part: it says as little as an unknown token.
        blank: those that say nothing, or stand for white space.
        wordless: those that say nothing, or have no letter or digit.
    """

    unread: frozenset[int]
    num_added: int
    single_bytes: frozenset[int]
    blank: frozenset[int]
    wordless: frozenset[int]

    def num_unread(self, tokens: Sequence[int]) -> int:
        """Return how many tokens of a text are unknown, spell such characters, or are control tokens of its own."""
        return max(0, len(tokens) - len(self._read(tokens)) - self.num_added)

    def is_unreadable(self, tokens: Sequence[int]) -> bool:
        """Whether nothing of a text is left: no sign at all, or where something was not read, no letter or digit."""
        read = self._read(tokens)
        return self.blank.issuperset(read) or (self.wordless.issuperset(read) and self.num_unread(tokens) > 0)

    def is_unread(self, tokens: Sequence[int]) -> bool:
        """Whether a text is not read whole, or not at all."""
        return self.num_unread(tokens) > 0 or self.is_unreadable(tokens)

    def _read(self, tokens: Sequence[int]) -> list[int]:
        if not self.single_bytes.isdisjoint(tokens):
            runs = [(is_byte, list(run)) for is_byte, run in itertools.groupby(tokens, self.single_bytes.__contains__)]
            tokens = [token for is_byte, run in runs if not is_byte or len(run) == 1 for token in run]
        return [token for token in tokens if token not in self.unread]


def token_kinds(tokenizer: Tokenizer | Any) -> TokenKinds:
    """Return what the tokens of a tokenizer say; of `tokenizers`, or of transformers with one of those within."""
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    content = tokenizer.to_str()
    model = json.loads(content)["model"]
    unknown = model["unk_id"] if model.get("unk_id") is not None else vocabulary.get(model.get("unk_token") or "")
    control = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    added = tokenizer.encode("").ids
    unread = control.union(added, () if unknown is None else (unknown,))
    shown = _shown(vocabulary, is_byte_level=_is_byte_level(content))
    single_bytes = {
        number
        for token, number in vocabulary.items()
        if (shown[number] == REPLACEMENT and len(token) == 1) or BYTE.fullmatch(token)
    }
    # A part of a character is one of a letter, as far as is known.
    has_letters = {number for number, text in shown.items() if REPLACEMENT in text or any(map(str.isalnum, text))}
    return TokenKinds(
        unread=frozenset(unread),
        num_added=len(added),
        single_bytes=frozenset(single_bytes),
        blank=frozenset(unread.union(number for number, text in shown.items() if not text.strip())),
        wordless=frozenset(unread.union(shown.keys() - has_letters)),
    )


def spells_bytes(path: Path) -> bool:
    """Whether a `tokenizer.json` writes what it lacks in bytes, in place of an unknown token."""
    content = path.read_text(encoding="utf-8")
    return _is_byte_level(content) or bool(json.loads(content)["model"].get("byte_fallback"))


def _is_byte_level(content: str) -> bool:
    return '"ByteLevel"' in content


def _shown(vocabulary: dict[str, int], *, is_byte_level: bool) -> dict[int, str]:
    """Return what each token stands for, by its id."""
    if not is_byte_level:
        return {number: token.translate(SPACE) for token, number in vocabulary.items()}
    from tokenizers.decoders import ByteLevel

    decode = ByteLevel().decode
    return {number: decode([token]) for token, number in vocabulary.items()}

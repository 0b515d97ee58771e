"""The rare token that stands for a subject: it must be in the captions, and must not be a word with a meaning.

A word that the text encoder's tokenizer has as one piece, among the first of its vocabulary, has been read in many
texts (SentencePiece and BPE order pieces by how often they occur): its meaning goes on beside the one it is to get.
"""

import re
from collections.abc import Sequence

from encoders.text import clean_text
from encoders.tokens import find_tokenizer, load_tokenizer
from encoders.weights import resolve_model
from errors import UserError
from features.jobs import FeatureInputs

# DreamBooth takes its tokens from behind the first so many of T5's (Ruiz et al. 2022, section 3.2).
NUM_COMMON_PIECES = 5000
# A word in front of the token, for tokenizers that tell words from the beginning of a text.
BEFORE = "a "


def require_token(inputs: FeatureInputs, texts: Sequence[str], *, what: str) -> None:
    """Refuse a `features.<name>.token` that none of `texts` (`what` they are) has, or that is a common word.

    Raises:
        UserError: names the key and the value.
    """
    token, key = inputs.features.token, f"features.{inputs.stage_name}.token"
    if token is None:
        return
    as_a_word = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)
    if not any(as_a_word.search(text) for text in texts):
        raise UserError(f"{key} = {token!r} is not in {what}, such as {texts[0]!r}" if texts else f"{key}: no texts")
    source = resolve_model(inputs.features.text_model, inputs.features.text_revision)
    path = find_tokenizer(source)
    if path is None:  # a model that is yet to be fetched, and is looked at then
        return
    encoding = load_tokenizer(path).encode(clean_text(BEFORE + token, inputs.features.text_cleaning))
    pieces = [number for number, (_, stop) in zip(encoding.ids, encoding.offsets, strict=True) if stop > len(BEFORE)]
    if len(pieces) == 1 and pieces[0] < NUM_COMMON_PIECES:
        raise UserError(
            f"{key} = {token!r} is a common word: it is one piece, number {pieces[0]:,}, of the vocabulary of "
            f"{inputs.features.text_model}, of which the first {NUM_COMMON_PIECES:,} are; take one without a meaning, "
            "such as 'sks', or leave the key out"
        )

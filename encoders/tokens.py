"""A text encoder's tokenizer without its weights: how long texts are in tokens, and what of them is cut."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.text import clean_text
from encoders.weights import ModelSource, find_file
from errors import MissingFileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


def fetch_tokenizer(source: ModelSource, *, key: str) -> Path:
    """Return the path of a model's `tokenizer.json`; a hub model's is downloaded if it is not in the cache.

    Raises:
        MissingFileError: a local folder has none; names `key`.
        StorageError: it is out of the hub's reach.
    """
    path = find_file(source, TOKENIZER_FILE)
    if path is not None:
        return path
    if Path(source.location).is_dir():
        raise MissingFileError(
            f"{Path(source.location) / TOKENIZER_FILE} does not exist; {key} must hold a fast tokenizer"
        )
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source.location, TOKENIZER_FILE, revision=source.revision))


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`, which neither cuts nor pads."""
    # The workers are the parallelism; threads of the tokenizer would only get in their way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def pretrained_tokenizer(source: ModelSource, *, folder: str | None = None) -> Any:
    """Return transformers' tokenizer of a model, which lies beside its weights or in a `folder` of its own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder or source.location, revision=source.revision or "main")


def find_lost_words(
    texts: Sequence[str], source: ModelSource, *, max_tokens: int, cleaning: str, tokenizer: str | None = None
) -> dict[str, str]:
    """Return, of each text that is longer than an encoder reads, the words that are cut off.

    `tokenizer` is a folder, where the tokenizer does not lie beside the weights.
    """
    tokenizes = pretrained_tokenizer(source, folder=tokenizer)
    # What is too long is no surprise here, the tokenizer need not warn of it.
    tokenizes.model_max_length = 10**9
    lost: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        cleaned = clean_text(text, cleaning)
        tokens = tokenizes(cleaned).input_ids
        if len(tokens) > max_tokens:
            kept = tokenizes(cleaned, truncation=True, max_length=max_tokens).input_ids
            # The last place may be the end token's, which is in both but not at the same place.
            num_kept = next(
                place for place, (one, other) in enumerate(zip([*kept, -1], tokens, strict=False)) if one != other
            )
            lost[text] = tokenizes.decode(tokens[num_kept:], skip_special_tokens=True)
    return lost

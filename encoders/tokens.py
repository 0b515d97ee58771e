"""A text encoder's tokenizer without its weights: how long texts are in tokens, and what of them is cut."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.text import clean_text
from encoders.weights import ModelSource, fetch_files, find_file, loadable
from errors import MissingFileError, UserError, describe_unfetched

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# As the published T5 have it alone, SentencePiece's file, of which transformers makes a tokenizer.
TOKENIZER_FILE, PIECES_FILE = "tokenizer.json", "spiece.model"
VOCABULARIES = (TOKENIZER_FILE, PIECES_FILE, "tokenizer.model", "vocab.json", "vocab.txt")
PIPELINE_INDEX = "model_index.json"
TEXTS_AT_ONCE = 4096


def find_tokenizer(source: ModelSource) -> Path | None:
    """Return the file of a model's tokenizer in its folder or in the hub's cache, None if it is in neither.

    That of a pipeline's `text_encoder` lies in the `tokenizer` beside it.
    """
    return next(filter(None, (find_file(source, name) for name in (TOKENIZER_FILE, PIECES_FILE))), _beside(source))


def _beside(source: ModelSource) -> Path | None:
    folder = Path(source.location).resolve()
    if not (folder.is_dir() and (folder.parent / PIPELINE_INDEX).is_file()):
        return None
    files = [folder.parent / "tokenizer" / name for name in (TOKENIZER_FILE, PIECES_FILE)]
    return next((path for path in files if path.is_file()), None)


def fetch_tokenizer(source: ModelSource, *, key: str) -> Path:
    """Return the file of a model's tokenizer; a hub model's is downloaded if it is not in the cache.

    Raises:
        MissingFileError: a local folder has none; names `key`.
        UserError: it is out of the hub's reach; names `key`.
    """
    path = find_tokenizer(source)
    if path is not None:
        return path
    if not Path(source.location).is_dir():
        fetch_files(source, [TOKENIZER_FILE, PIECES_FILE, "*.json"], key=key)
        path = find_tokenizer(source)
    if path is None:
        raise MissingFileError(f"{key} {source.location!r} holds neither {TOKENIZER_FILE} nor {PIECES_FILE}")
    return path


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json` or `spiece.model`, which neither cuts nor pads.

    Raises:
        UserError: the file is damaged, or is none; names it.
    """
    # The workers are the parallelism; threads of the tokenizer would only get in their way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    with path.open("rb") as file:
        fault = describe_unfetched(file.read(1024))
    if fault is not None:
        raise UserError(f"{path} {fault}")
    if path.name == PIECES_FILE:
        tokenizer = _load_auto(str(path.parent)).backend_tokenizer
    else:
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no narrower one
            raise UserError(f"{path} is damaged or no tokenizer ({error}); fetch the model again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def pretrained_tokenizer(source: ModelSource, *, folder: str | None = None) -> Any:
    """Return transformers' tokenizer of a model, which lies as `find_tokenizer` has it or in a `folder` of its own.

    Raises:
        UserError: there is none, or it is damaged; names the folder.
    """
    if folder is None and (file := find_tokenizer(source)) is not None and file == _beside(source):
        folder = str(file.parent)
    return _load_auto(folder or loadable(source, key="tokenizer"), revision=source.revision)


def _load_auto(location: str, *, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    # transformers makes a tokenizer of no words where there is no vocabulary.
    source = ModelSource(location, revision, "")
    if Path(location).is_dir() and not any(find_file(source, name) for name in VOCABULARIES):
        raise UserError(f"the tokenizer in {location} cannot be loaded: it has none of {', '.join(VOCABULARIES)}")
    try:
        return AutoTokenizer.from_pretrained(location, revision=revision or "main")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # also where JSON holds something else
        said = str(error).strip() or type(error).__name__
        raise UserError(f"the tokenizer in {location} cannot be loaded: {said.splitlines()[0]}") from error


@dataclass(frozen=True, kw_only=True)
class TextCut:
    """How much of some texts is longer than a model reads; tokens are counted with those that begin and end a text.

    Attributes:
        num_texts: all of them, and num_cut those that are longer than `max_tokens`.
        num_tokens: of all texts, and num_tokens_cut those that the model does not read.
    """

    max_tokens: int
    num_texts: int = 0
    num_cut: int = 0
    num_tokens: int = 0
    num_tokens_cut: int = 0

    def describe(self, *, noun: str, model: str) -> str:
        """Return the count as a sentence, such as "3 of 96 prompts are longer than the 77 tokens that CLIP reads"."""
        if not self.num_cut:
            return f"none of {self.num_texts:,} {noun} is longer than the {self.max_tokens} tokens that {model} reads"
        return (
            f"{self.num_cut:,} of {self.num_texts:,} {noun} are longer than the {self.max_tokens} tokens that {model} "
            f"reads, which sees only their start: {self.num_tokens_cut:,} of {self.num_tokens:,} tokens are cut off"
        )


def count_tokens(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Return how long each text is, with the tokens that begin and end it; `tokenizer` is transformers'."""
    lengths: list[int] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        # What is too long is no surprise here, the tokenizer need not warn of it.
        ids = tokenizer(list(texts[start : start + TEXTS_AT_ONCE]), verbose=False).input_ids
        lengths += [len(tokens) for tokens in ids]
    return lengths


def count_cut(texts: Sequence[str], tokenizer: Any, *, max_tokens: int) -> TextCut:
    """Count what a model that reads `max_tokens` does not see of `texts`; `tokenizer` is transformers'."""
    lengths = count_tokens(texts, tokenizer)
    beyond = [length - max_tokens for length in lengths if length > max_tokens]
    return TextCut(
        max_tokens=max_tokens,
        num_texts=len(lengths),
        num_cut=len(beyond),
        num_tokens=sum(lengths),
        num_tokens_cut=sum(beyond),
    )


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

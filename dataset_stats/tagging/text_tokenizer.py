"""The T5 tokenizer, which measures how much of a caption the text encoder reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from encoders.models import resolve_model
from pipelines.engine.progress import get_logger

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = get_logger("dataset_stats")


def find_text_tokenizer(model_id: str, revision: str | None) -> str:
    """Path of the model's `tokenizer.json`, or an empty string, with a warning, where it cannot be had."""
    source = resolve_model(model_id, revision)
    folder = Path(source.location)
    if folder.is_dir():
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; features.text_model must hold a fast tokenizer")
        return str(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(source.location, "tokenizer.json", revision=source.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        log.warning(
            f"T5 lengths are not measured: the tokenizer of {model_id} is out of reach ({type(error).__name__})"
        )
        return ""


def load_text_tokenizer(path: str) -> Tokenizer:
    """Tokenizer of a `tokenizer.json`, which neither cuts nor pads."""
    # The workers are the parallelism; threads of the tokeniser would only get in their way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

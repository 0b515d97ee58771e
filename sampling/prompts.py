"""What is to be drawn: prompts or classes from a file, the recipe or the command line, and the seed of each image."""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_SEEDS = 2**32
MAX_KEY_LENGTH = 60


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of a prompt file; `aspect_ratio` is width / height; `label` is set for class-conditional models."""

    key: str
    text: str
    seed: int
    aspect_ratio: float = 1.0
    label: int | None = None


def read_prompts(path: Path, *, seed: int) -> list[Prompt]:
    """Read a .txt file (one prompt per line) or a .jsonl file (`prompt`, and optionally `key` and `aspect_ratio`).

    Without a key, a prompt's first words become its key. Its seed comes from key and `seed`, so that prompts do not
    share noise and the order of lines does not matter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the line that is not JSON or has no prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"sampling.prompts {path} does not exist")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"sampling.prompts {path} is not UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        rows = [_parse_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    elif path.suffix == ".txt":
        rows = [{"prompt": line.strip()} for line in lines if line.strip()]
    else:
        raise ValueError(f"sampling.prompts {path} is neither .txt nor .jsonl")
    if not rows:
        raise ValueError(f"sampling.prompts {path} holds no prompt")
    return [_make_prompt(row, seed) for row in rows]


def single_prompt(text: str, *, seed: int) -> Prompt:
    """Return the prompt of a command line, drawn from `seed` itself."""
    return Prompt(key=_key_of(text), text=text, seed=seed)


def class_prompts(classes: Sequence[int], *, seed: int) -> list[Prompt]:
    """Return one request per class label for a class-conditional model."""
    keys = [f"class_{label:04d}" for label in classes]
    return [
        Prompt(key=key, text=f"class {label}", seed=_seed_of(key, seed), label=label)
        for key, label in zip(keys, classes, strict=True)
    ]


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"sampling.prompts {where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f"sampling.prompts {where} has no text under `prompt`")
    ratio = row.get("aspect_ratio", 1.0)
    if not isinstance(ratio, int | float) or not ratio > 0:
        raise ValueError(f"sampling.prompts {where}: aspect_ratio {ratio!r} is not a positive number (width / height)")
    key = row.get("key", "")
    if not isinstance(key, str) or re.search(r"[/\\\0]", key) or key.startswith("."):
        raise ValueError(f"sampling.prompts {where}: key {key!r} cannot name a file")
    return row


def _make_prompt(row: dict[str, Any], seed: int) -> Prompt:
    key = row.get("key") or _key_of(row["prompt"])
    ratio = float(row.get("aspect_ratio", 1.0))
    return Prompt(key=key, text=row["prompt"], seed=_seed_of(key, seed), aspect_ratio=ratio)


def _key_of(text: str) -> str:
    slug = re.sub(r"\W+", "-", text.lower()).strip("-")[:MAX_KEY_LENGTH].strip("-")
    # the digits keep apart prompts that differ only behind the slug's end
    return f"{slug or 'prompt'}-{zlib.crc32(text.encode()):08x}"


def _seed_of(key: str, seed: int) -> int:
    return (zlib.crc32(key.encode()) + seed) % NUM_SEEDS

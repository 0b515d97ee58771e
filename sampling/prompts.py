"""What is to be drawn: prompts or classes from a file, the recipe or the command line, and the seed of each image."""

import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_flag, typed_path
from pipelines.engine.progress import get_logger
from pipelines.raw.texts import decode_text

log = get_logger("sampling")

NUM_SEEDS = 2**32
MAX_KEY_LENGTH = 60
MAX_KEY_BYTES = 200  # a file's name has 255 at most
RESERVED_KEYS = ("grid",)  # grid.png is the picture of all
# Of .jsonl and .parquet files, beside the prompt.
COLUMNS = ("key", "aspect_ratio", "control")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        aspect_ratio: width / height; None where the line does not say it.
        label: set for class-conditional models.
        control: image that leads what is drawn.
        style: that it is in, if it is drawn in several.
    """

    key: str
    text: str
    seed: int
    aspect_ratio: float | None = None
    label: int | None = None
    control: Path | None = None
    style: str | None = None


def read_prompts(path: Path, *, seed: int, column: str = "prompt") -> list[Prompt]:
    """Read a .txt file (one prompt per line), or a .jsonl or .parquet file (`column`, if wanted those of `COLUMNS`).

    An image that `control` names lies beside the file, unless it is an absolute path. Without a key, a prompt's first
    words become its key. Its seed comes from key and `seed`, so that prompts do not share noise and the order of lines
    does not matter. Blank lines are left out, with a warning unless they are last.

    Raises:
        MissingFileError: there is no such file, or no image that a line names.
        UserError: names the file or the line that cannot be used, or both lines that share a key.
    """
    if not path.is_file():
        raise MissingFileError(f"sampling.prompts {path} does not exist, or is no file")
    rows = _read_parquet(path, column) if path.suffix == ".parquet" else _read_lines(path, column)
    if not rows:
        raise UserError(f"sampling.prompts {path} holds no prompt")
    lines: dict[str, str] = {}
    prompts = []
    for place, row in rows:
        prompt = _make_prompt(row, f"{path}:{place}", seed=seed, folder=path.parent)
        if (first := lines.setdefault(prompt.key, place)) != place:
            raise UserError(
                f"sampling.prompts {path}:{place} repeats key {prompt.key!r} of line {first}: each key names one file "
                f"(for several images of a prompt set {typed_flag('n')})"
            )
        prompts.append(prompt)
    return prompts


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


def _read_lines(path: Path, column: str) -> list[tuple[str, dict[str, Any]]]:
    """Return line number and row of each line of a .txt or .jsonl file that is not blank."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"sampling.prompts {path} is none of .txt, .jsonl and .parquet")
    try:
        lines = re.split("\r\n|\n|\r", decode_text(path.read_bytes()).rstrip())
    except (UnicodeDecodeError, PermissionError) as error:
        raise UserError(f"sampling.prompts {path} cannot be read as UTF-8 text: {error}") from None
    blank = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
    if blank and len(blank) < len(lines):
        log.warning(f"sampling.prompts {path}: blank lines are left out: {', '.join(blank[:10])}")
    written = [(str(number), line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".txt":
        return [(number, {"prompt": line}) for number, line in written]
    return [(number, _parse_json(line, column, f"{path}:{number}")) for number, line in written]


def _parse_json(line: str, column: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"sampling.prompts {where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"sampling.prompts {where} has no text under `{column}`: it is no JSON object")
    return {"prompt": row.get(column)} | {name: row[name] for name in COLUMNS if row.get(name) is not None}


def _read_parquet(path: Path, column: str) -> list[tuple[str, dict[str, Any]]]:
    """Return number, counted from 1, and row of each row of a Parquet file."""
    try:
        names = pq.read_schema(path).names
        wanted = [name for name in dict.fromkeys((column, *COLUMNS)) if name in names]
        table = pq.read_table(path, columns=wanted)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"sampling.prompts {path} cannot be read as Parquet: {error}") from None
    if column not in names:
        raise UserError(f"sampling.prompts {path} has no column {column!r}; it has {', '.join(names)}")
    rows = table.rename_columns(["prompt" if name == column else name for name in wanted]).to_pylist()
    return [
        (str(number), {name: value for name, value in row.items() if name == "prompt" or value is not None})
        for number, row in enumerate(rows, 1)
    ]


def _make_prompt(row: dict[str, Any], where: str, *, seed: int, folder: Path) -> Prompt:
    text, ratio = row["prompt"], row.get("aspect_ratio")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"sampling.prompts {where} has no text: the prompt is {text!r}")
    if ratio is not None and (not isinstance(ratio, int | float) or not 0 < ratio < math.inf):
        raise UserError(f"sampling.prompts {where}: aspect_ratio {ratio!r} is not a positive number (width / height)")
    key = row.get("key")
    if key is not None and not isinstance(key, str):
        raise UserError(f'sampling.prompts {where}: key {key!r} is no text: write it in quotes, "{key}"')
    key = key or _key_of(text)
    if (
        re.search(r"[/\\\0]", key)
        or key.startswith(".")
        or key in RESERVED_KEYS
        or len(key.encode(errors="surrogateescape")) > MAX_KEY_BYTES
    ):
        raise UserError(
            f"sampling.prompts {where}: key {key!r} cannot name a file: no slash, no dot in front, "
            f"at most {MAX_KEY_BYTES} bytes, not {RESERVED_KEYS[0]}"
        )
    return Prompt(
        key=key,
        text=text,
        seed=_seed_of(key, seed),
        aspect_ratio=None if ratio is None else float(ratio),
        control=_find_control(row.get("control"), where, folder=folder),
    )


def _find_control(name: object, where: str, *, folder: Path) -> Path | None:
    if name is None:
        return None
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"sampling.prompts {where}: control {name!r} is no path of an image")
    path = folder / typed_path(name)
    if not path.exists():
        raise MissingFileError(f"sampling.prompts {where}: control {path} does not exist")
    return path


def longer_key(key: str, suffix: str) -> str:
    """Return a key with a suffix, cut so that it still names a file; digits keep apart those that are cut alike."""
    whole = f"{key}-{suffix}"
    encoded = whole.encode(errors="surrogateescape")
    if len(encoded) <= MAX_KEY_BYTES:
        return whole
    digits = f"-{zlib.crc32(encoded):08x}"
    return encoded[: MAX_KEY_BYTES - len(digits)].decode(errors="ignore") + digits


def _key_of(text: str) -> str:
    slug = re.sub(r"\W+", "-", text.lower()).strip("-")[:MAX_KEY_LENGTH].strip("-")
    # the digits keep apart prompts that differ only behind the slug's end
    return f"{slug or 'prompt'}-{zlib.crc32(text.encode()):08x}"


def _seed_of(key: str, seed: int) -> int:
    return (zlib.crc32(key.encode()) + seed) % NUM_SEEDS

"""Prompts that are drawn in every style of a list: each `{style}` becomes the style's words, the noise stays."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from errors import MissingFileError, UserError
from pipelines.as_typed import ANY, typed_flag, typed_path
from pipelines.raw.texts import decode_text
from sampling.prompts import Prompt, longer_key

KEY, PLACE = "sampling.styles", "{style}"
MAX_SLUG_LENGTH = 40


def read_styles(styles: Sequence[str], *, run: Path) -> list[str]:
    """Return the styles themselves: those of a .txt file, one a line, where the only one is its path.

    Raises:
        MissingFileError: there is no such file.
        UserError: one is empty, or two would name one file; names the key or the file.
    """
    where = KEY
    if len(styles) == 1 and styles[0].endswith(".txt"):
        path = typed_path(styles[0].replace("{run}", str(run)))
        if not path.is_file():
            raise MissingFileError(f"{KEY} {path} does not exist, or is no file")
        try:
            styles = [line.strip() for line in decode_text(path.read_bytes()).splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{KEY} {path} cannot be read as UTF-8 text: {error}") from None
        where = f"{KEY} {path}"
    if not styles or not all(style.strip() for style in styles):
        raise UserError(f"{where}: a style is empty: name styles with commas between them, or one a line")
    first: dict[str, str] = {}
    for style in styles:
        if (other := first.setdefault(_slug(style), style)) != style or styles.count(style) > 1:
            raise UserError(f"{where}: {other!r} and {style!r} would name the same files: leave one out")
    return list(styles)


def in_styles(prompts: Sequence[Prompt], styles: Sequence[str]) -> list[Prompt]:
    """Return each prompt in every style, in the order of prompts: the key tells the style, and the seed is one.

    Without styles they come back as they are.

    Raises:
        UserError: a prompt has no place for a style, or has one and there are none; names the prompt.
    """
    for prompt in prompts:
        if styles and PLACE not in prompt.text:
            raise UserError(f"{KEY} is set, but the prompt {prompt.text[:80]!r} has no {PLACE}, where a style stands")
        if not styles and PLACE in prompt.text:
            raise UserError(
                f"the prompt {prompt.text[:80]!r} has a {PLACE}, and {KEY} is not set: type {typed_flag('styles', ANY)}"
            )
    if not styles:
        return list(prompts)
    return [
        replace(prompt, key=longer_key(prompt.key, _slug(style)), text=prompt.text.replace(PLACE, style), style=style)
        for prompt in prompts
        for style in styles
    ]


def _slug(style: str) -> str:
    return re.sub(r"\W+", "-", style.lower()).strip("-")[:MAX_SLUG_LENGTH].strip("-") or "style"

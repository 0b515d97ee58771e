"""docs/FAULTS.md: the tests that it names exist, and what it quotes is what the program says."""

import ast
import re
from functools import cache

from tests.conftest import REPOSITORY
from tests.test_house_floors import SOURCES

PAGE = REPOSITORY / "docs" / "FAULTS.md"
NUM_COLUMNS = 4
# What stands for a value, and words that are left out.
PLACEHOLDER = re.compile(r"\bN\b|[A-Z][A-Z0-9]+|…")
# A message is put together: of what was done, and what is wrong with it.
MAX_PIECES = 2
WORD = re.compile(r"\w+|[^\w\s]")


def rows() -> list[list[str]]:
    """The cells of each row of every table, without headings."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "what happened" and not row[0].startswith("---")]


def fragments() -> list[str]:
    """What is quoted, cut at its placeholders."""
    quotes = [quote for row in rows() for quote in re.findall(r'"([^"]+)"', row[1])]
    return sorted({part.strip() for quote in quotes for part in PLACEHOLDER.split(quote) if len(part.strip()) > 2})


@cache
def program_words() -> str:
    """The words of every text in the sources, with what is filled in cut out."""
    paths = [*SOURCES, REPOSITORY / "errors.py"]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return "\0".join(f" {' '.join(WORD.findall(text))} " for text in texts)


def num_pieces(text: str) -> int:
    """Of how many pieces of the program's texts, as long as can be, `text` is put together."""
    words, count, start = WORD.findall(text), 0, 0
    while start < len(words):
        stop = start
        while stop < len(words) and f" {' '.join(words[start : stop + 1])} " in program_words():
            stop += 1
        if stop == start:
            return MAX_PIECES + 1
        count, start = count + 1, stop
    return count


def test_every_row_is_whole_and_names_tests() -> None:
    assert len(rows()) > 100
    for row in rows():
        assert len(row) == NUM_COLUMNS and all(row), row
        assert re.fullmatch(r"`test_\w+\.py::test_\w+`(, `test_\w+\.py::test_\w+`)*", row[3]), row


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text()))
    missing = []
    for file, name in sorted(named):
        path = REPOSITORY / "tests" / file
        if not path.is_file() or f"\ndef {name}(" not in path.read_text():
            missing.append(f"{file}::{name}")
    assert missing == []


def test_what_is_quoted_is_what_the_program_says() -> None:
    assert len(fragments()) > 200
    assert [text for text in fragments() if num_pieces(text) > MAX_PIECES] == []

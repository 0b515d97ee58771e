"""No message of the house recommends a key of the recipe that does not exist."""

import ast
import re
from pathlib import Path

from atelier.keys import TABLES, keys_of

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = (
    "pipelines",
    "encoders",
    "pixart",
    "captioning",
    "curation",
    "dataset_stats",
    "features",
    "training",
    "sampling",
    "atelier",
)
NAMED = re.compile(r"(?<![\w./`{}-])(" + "|".join(table.name for table in TABLES) + r")\.([a-z]\w*)(?![\w./])")
# Names of files and methods, of figures and versions, and what a key was called before.
NO_KEYS = {
    *("model.safetensors", "model.state_dict"),
    *("captioning.clip_score_captions", "dataset_stats.counts", "training.init_from"),
}


OF_NAMED = re.compile(r"(?<![\w./`{}-])(features|training)\.\0\.([a-z]\w*)(?![\w./])")


def said(path: Path) -> set[str]:
    """All `table.key` in the texts of a module, but for its docstrings and the names of modules."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]
    # A name that is filled in, as in `training.{stage}.num_steps`, is one of a table.
    texts += [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
    ]
    return {".".join(match) for text in texts for match in (*NAMED.findall(text), *OF_NAMED.findall(text))}


def is_module(name: str) -> bool:
    path = REPOSITORY / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_every_key_that_a_message_names_exists() -> None:
    known = {
        f"{table.name}.{key.name.partition('.')[0].removesuffix('[]')}"
        for table in TABLES
        for key in keys_of(table.model)
    }
    named = {name: path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py") for name in said(path)}
    assert len(named) > 40, "messages name keys; if none is found, this test has gone blind"
    wrong = {name: path.name for name, path in named.items() if name not in known | NO_KEYS and not is_module(name)}
    assert wrong == {}

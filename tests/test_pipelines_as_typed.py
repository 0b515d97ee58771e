"""Messages name commands and flags as they are typed at the door that was taken, and none that is not there."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atelier.commands import FLAGS, SUBCOMMANDS
from pipelines.as_typed import ANY, did_you_mean, enter_by, typed_command, typed_flag, typed_path, variable
from tests.conftest import REPOSITORY
from tests.test_house_floors import SOURCES

# They are the doors themselves: what they list has both words beside each other.
DOORS = [REPOSITORY / "atelier" / name for name in ("commands.py", "typed.py", "door.py")]
USAGES = {f"atelier {name}" for name in SUBCOMMANDS}
VARIABLES = "|".join(sorted(map(variable, FLAGS), key=len, reverse=True))
OF_ONE_DOOR = re.compile(rf"\b(make|atelier) ({'|'.join(SUBCOMMANDS)})\b|(?<![\w.])({VARIABLES})=|`make (?!demo)")


@pytest.mark.parametrize(
    ("name", "flags", "by_make", "by_atelier"),
    [
        ("train", {"stage": 2, "run": "a b"}, "make train STAGE=2 RUN='a b'", "atelier train --stage 2 --run 'a b'"),
        ("caption", {"retry": True}, "make caption RETRY=1", "atelier caption --retry"),
        ("features", {"stage": ANY}, "make features STAGE=…", "atelier features --stage …"),
        ("verify", {}, "make verify", "atelier verify"),
    ],
)  # fmt: skip
def test_a_command_is_named_as_it_is_typed_at_the_door_that_was_taken(name, flags, by_make, by_atelier) -> None:
    for make, said in ((True, by_make), (False, by_atelier)):
        enter_by(make=make)
        assert typed_command(name, flags) == said
        assert typed_flag("from-scratch") == ("FROM_SCRATCH" if make else "--from-scratch")


def test_the_nearest_known_words_are_named() -> None:
    assert did_you_mean("stpes", ["steps", "stage"], prefix="a.") == " (did you mean a.steps?)"
    assert did_you_mean("captoin", ["caption", "captions", "x"], most=3) == " (did you mean caption or captions?)"
    assert did_you_mean("stpes", ["dtype", "num_steps", "warmup_steps"]) == " (did you mean num_steps?)"
    assert did_you_mean("xyz", ["steps"]) == ""


def texts(path: Path) -> Iterator[ast.Constant]:
    """Every text of a file that is no docstring."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


def test_no_message_has_the_words_of_one_door_alone() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}: {node.value!r}"
        for path in (*SOURCES, REPOSITORY / "errors.py")
        for node in (() if path in DOORS else texts(path))
        if OF_ONE_DOOR.search(node.value) and node.value not in USAGES
    ]
    assert found == []


def test_a_tilde_in_front_of_what_is_no_user_is_part_of_a_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed_path("~/a b") == tmp_path / "a b" and typed_path("a/~") == Path("a/~")
    assert typed_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    paths = [path for path in SOURCES if ".expanduser(" in path.read_text()]
    assert [path.name for path in paths] == ["as_typed.py"], "pathlib's ends with an error there"


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield path, node


def test_every_command_and_flag_that_a_message_names_is_there() -> None:
    named = 0
    for path, call in calls("typed_command"):
        first, *others = call.args
        if not isinstance(first, ast.Constant):
            continue
        flags = [key.value for other in others if isinstance(other, ast.Dict) for key in other.keys]
        assert first.value in SUBCOMMANDS, path
        assert set(flags) <= set(SUBCOMMANDS[first.value].flags), (path, first.value, flags)
        named += 1
    for path, call in calls("typed_flag"):
        if isinstance(call.args[0], ast.Constant):
            assert call.args[0].value in FLAGS, path
            named += 1
    assert named > 40


def test_what_a_command_says_is_said_in_the_words_of_its_door(tmp_path) -> None:
    def said(*typed: str, **exported: str) -> str:
        line = [sys.executable, "-m", "atelier", *typed]
        done = subprocess.run(line, cwd=REPOSITORY, env=os.environ | exported, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        return " ".join(done.stderr.split())

    run = str(tmp_path / "run")
    assert said("caption", "--run", run, "--recipe", "finetune").endswith("type --shards … once for the run")
    by_make = said("caption", "--from-make", "RUN RECIPE", RUN=run, RECIPE="finetune")
    assert by_make.endswith("type SHARDS=… once for the run")

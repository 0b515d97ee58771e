"""What a command says when it fails: one line for what a user can mend, a traceback for a fault of the program."""

import errno
import os
from pathlib import Path

import pytest
from rich.table import Table

from errors import MissingFileError, ProgramFault, StorageError, UserError
from pipelines.command import FAULT, parse_command, run_command
from pipelines.engine.progress import ProgressBar, console, get_logger, progress_bar
from pipelines.recipe import DataConfig
from pipelines.store.files import atomic_write_bytes, exclusive
from pipelines.store.summary import update_summary

TEXTS = ["[INST] a cat [/INST]", "[/red]", "[bold]x", "back\\[slash]", ":cat: :warning:", "[link=x]y", "{x} %s"]


def said_of(error: BaseException, capsys) -> tuple[int, str]:
    """Status and words of a command that raises `error`."""

    def main() -> None:
        raise error

    status = run_command("room", main)
    said = capsys.readouterr()
    assert said.out == ""
    return status, said.err


@pytest.mark.parametrize("kind", [UserError, MissingFileError, StorageError])
def test_what_a_user_can_mend_is_one_line(kind, capsys) -> None:
    assert said_of(kind("training.seed = -1: too small"), capsys) == (2, "room: training.seed = -1: too small\n")


@pytest.mark.parametrize(
    "error", [ValueError("a"), KeyError("a"), FileNotFoundError("a"), OSError("a"), AssertionError()]
)
def test_a_fault_of_the_program_keeps_its_traceback(error, capsys) -> None:
    status, said = said_of(error, capsys)
    assert status == 1 and said.startswith("room: Traceback (most recent call last):")
    assert "raise error" in said and type(error).__name__ in said and said.endswith(f"{FAULT}\n")


def test_lists_that_differ_are_a_fault_of_the_program(capsys) -> None:
    def main() -> None:
        list(zip([1], [], strict=True))

    assert run_command("room", main) == 1
    assert "ValueError: zip() argument 2 is shorter than argument 1" in capsys.readouterr().err


def test_a_fault_in_another_process_is_shown_as_it_was_there(capsys) -> None:
    status, said = said_of(ProgramFault("in a worker process:\nTraceback …\nKeyError: 'x'"), capsys)
    assert (status, said) == (1, f"room: in a worker process:\nTraceback …\nKeyError: 'x'\n{FAULT}\n")


def test_a_traceback_of_a_users_mistake_is_shown_when_asked_for(capsys, monkeypatch) -> None:
    monkeypatch.setenv("ATELIER_TRACEBACK", "1")
    status, said = said_of(UserError("no"), capsys)
    assert status == 2 and "raise error" in said and said.endswith("room: no\n")


def test_an_interruption_says_how_to_go_on(capsys) -> None:
    assert said_of(KeyboardInterrupt(), capsys) == (130, "room: interrupted; the same command continues\n")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "you may not read or write this"),
        (errno.EMFILE, "too many files are open"),
        (errno.EIO, "the storage does not answer"),
        (errno.EISDIR, "this is not what is needed there"),
        (errno.ENOTDIR, "this is not what is needed there"),
        (errno.ENAMETOOLONG, "this is not what is needed there"),
    ],
)
def test_storage_that_fails_is_named_with_what_to_do(number, words, capsys) -> None:
    status, said = said_of(OSError(number, os.strerror(number), "/data/x"), capsys)
    assert status == 2 and said.startswith(f"room: /data/x: {words} ({os.strerror(number)}); ")


def test_what_stands_in_the_way_of_a_run_is_named(tmp_path, capsys) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    run.write_text("a file")
    link.symlink_to(tmp_path / "gone")
    for write in (lambda: update_summary(run, "a", 1), lambda: atomic_write_bytes(run / "x" / "y", b"")):
        assert run_command("room", write) == 2
        assert f"{run}: this is not what is needed there" in capsys.readouterr().err.replace("/x/y", "").replace(
            "/x:", ":"
        )
    for folder in (run, link):
        assert run_command("room", exclusive(folder).__enter__) == 2
        assert f"{folder}: this is not what is needed there (File exists)" in capsys.readouterr().err
    existing = FileExistsError(errno.EEXIST, "File exists", str(tmp_path))
    assert said_of(existing, capsys)[0] == 1  # a folder is where one was to be made: ours


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_printed_as_they_are(text, capsys, monkeypatch) -> None:
    monkeypatch.setattr(console, "width", 400)
    table = Table(text, title=text)
    table.add_row(text)
    console.print(table)
    console.print(text)
    console.print(ProgressBar(text, 2))
    bar = ProgressBar("room", 2, unit=text)
    bar.note = text
    console.print(bar)
    assert capsys.readouterr().err.count(text) == 7
    logger = get_logger("room")
    logger.warning(text)
    with progress_bar("room", 2, unit=text, log_interval_seconds=60) as bar:
        logger.info(bar.line())
    assert capsys.readouterr().err.count(text) == 3
    assert said_of(UserError(text), capsys) == (2, f"room: {text}\n")
    assert text in said_of(KeyError(text), capsys)[1].replace("\\\\", "\\")


@pytest.mark.parametrize("text", TEXTS)
def test_a_recipes_texts_in_errors_are_printed_as_they_are(text, tmp_path, capsys) -> None:
    recipe = tmp_path / "[red]r.toml"
    recipe.write_text("")

    def main() -> None:
        argv = ["--recipe", str(recipe), "--run", text, "--text", f"data.dialect={text}", "--text", "data.shards=a"]
        parse_command("x", "", argv=argv).recipe.table("data", DataConfig)

    assert run_command("room", main) == 2
    said = capsys.readouterr().err
    assert f"--text: data.dialect = {text!r}" in said.replace("\n", "") and "Traceback" not in said


def test_no_room_prints_markup() -> None:
    """Styles are `rich.text.Text`; a console that reads markup would read it in texts, too."""
    house = Path(__file__).resolve().parent.parent
    rooms = ("pipelines", "encoders", "captioning", "dataset_stats", "features", "training", "sampling", "toyworld")
    sources = [path for room in rooms for path in (house / room).rglob("*.py")]
    words = ("markup=True", "from_markup", "rich.markup", "[/]")
    assert [str(path) for path in sources if any(word in path.read_text() for word in words)] == []
    assert [path.name for path in sources if "Console(" in path.read_text()] == ["progress.py"]

"""What is typed once for a run is remembered: its recipe, settings and raw shards; it gives way to what is typed."""

import json
import os
import signal
from pathlib import Path

import pytest

from errors import MissingFileError, UserError
from pipelines.command import Command, parse_command
from pipelines.recipe import DataConfig
from pipelines.recipe_files import find_recipe
from pipelines.run_memory import MEMORY_NAME, recall_shards, remember_found
from pipelines.store.manifest import Fingerprint, ShardDirectory
from pipelines.store.verify.run import verify_run
from training.__main__ import main as training_main

RECIPE = "[sampling]\nseed = 1\nnum_steps = 20\n[training.one]\nnum_steps = 3\n"


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(RECIPE)
    (tmp_path / "b.toml").write_text(RECIPE.replace("seed = 1", "seed = 100"))
    for name in ("x", "y"):
        (tmp_path / f"{name}.tar").write_bytes(b"")
    return tmp_path


def command(*typed: str, has_stages: bool = False) -> Command:
    return parse_command("room", "", argv=["--run", "run", *typed], has_stages=has_stages)


def done(*typed: str, has_stages: bool = False) -> Command:
    """A command that has got as far as its work."""
    found = command(*typed, has_stages=has_stages)
    found.remember()
    return found


def memory() -> dict[str, object]:
    return json.loads(Path("run", MEMORY_NAME).read_text())


def test_a_run_alone_is_enough_once_a_recipe_has_been_named(house: Path, capsys) -> None:
    done("--recipe", "a.toml", "--set", "sampling.num_steps=8", "--settings", "sampling.size=8x8 sampling.seed=7")
    assert capsys.readouterr().err == ""
    later = command()
    assert later.recipe.tables["sampling"] == {"seed": 7, "num_steps": 8, "size": "8x8"}
    said = " ".join(capsys.readouterr().err.split())
    assert "recipe a.toml and sampling.num_steps = 8, sampling.seed = 7, sampling.size = 8x8 as remembered in" in said
    assert said.endswith("run/run.json")
    assert memory() == {
        "recipe": str(house / "a.toml"),
        "settings": {"sampling.num_steps": "8", "sampling.seed": "7", "sampling.size": "8x8"},
        "shards": {},
        "found": {},
    }


def test_what_is_typed_wins_and_joins_the_memory(house: Path, capsys) -> None:
    done("--recipe", "a.toml", "--set", "sampling.seed=7", "--set", "sampling.guide.a=1")
    found = done("--set", "sampling.seed=8", "--set", "sampling.guide={b = 2}")
    assert found.recipe.tables["sampling"] == {"seed": 8, "num_steps": 20, "guide": {"b": 2}}
    assert "sampling.seed" not in capsys.readouterr().err
    assert memory()["settings"] == {"sampling.seed": "8", "sampling.guide": "{b = 2}"}
    done("--set", "sampling.guide.c=3")
    assert command().recipe.tables["sampling"]["guide"] == {"b": 2, "c": 3}


def test_what_belongs_to_one_command_is_not_remembered(house: Path) -> None:
    typed = ("--text", "PROMPT:sampling.prompt=a: b", "--once", "GPUS:training.num_processes=8", "--plan")
    found = done("--recipe", "a.toml", *typed)
    assert found.recipe.tables["sampling"]["prompt"] == "a: b" and found.is_plan
    assert found.recipe.tables["training"]["num_processes"] == 8
    assert memory()["settings"] == {}
    assert "prompt" not in command().recipe.tables["sampling"]


def test_a_command_that_did_not_run_leaves_no_memory(house: Path) -> None:
    command("--recipe", "a.toml", "--set", "sampling.seed=7")
    assert not Path("run").exists()


def test_a_typed_recipe_is_taken_with_what_is_typed_alone(house: Path, capsys) -> None:
    done("--recipe", "a.toml", "--set", "sampling.seed=7", "--set", "sampling.num_steps=8")
    found = done("--recipe", "a.toml", "--set", "sampling.num_steps=9")
    assert found.recipe.tables["sampling"] == {"seed": 1, "num_steps": 9}
    assert "sampling.seed = 7 of run/run.json left out, as a recipe was typed" in " ".join(
        capsys.readouterr().err.split()
    )
    assert memory()["settings"] == {"sampling.seed": "7", "sampling.num_steps": "9"}
    found = done("--recipe", "b.toml", "--set", "sampling.size=4x4")
    assert found.recipe.tables["sampling"] == {"seed": 100, "num_steps": 20, "size": "4x4"}
    assert memory() == {
        "recipe": str(house / "b.toml"),
        "settings": {"sampling.size": "4x4"},
        "shards": {},
        "found": {},
    }


def test_without_memory_the_default_is_the_papers_recipe(house: Path, capsys) -> None:
    found = command("--stage", "2", has_stages=True)
    assert found.recipe.path.name == "pixart-alpha.toml" and "stage2" in found.recipe.names("training")
    assert "pixart-alpha.toml, the default" in " ".join(capsys.readouterr().err.split())


def test_a_recipe_that_nobody_typed_is_not_remembered_as_typed(house: Path, capsys) -> None:
    done("--set", "sampling.seed=7")
    assert memory()["recipe"] is None and memory()["settings"] == {"sampling.seed": "7"}
    capsys.readouterr()
    assert command().recipe.tables["sampling"]["seed"] == 7
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith(
        "pixart-alpha.toml, the default; RECIPE names another, and sampling.seed = 7 as remembered in run/run.json"
    )
    done("--recipe", "pixart-alpha", "--set", "sampling.num_steps=9")
    assert memory()["recipe"] == "pixart-alpha"
    assert memory()["settings"] == {"sampling.seed": "7", "sampling.num_steps": "9"}, "it is the same recipe"


@pytest.mark.parametrize("change", ["deleted", "folder", "broken"])
def test_a_remembered_recipe_that_is_gone_is_named(house: Path, change: str) -> None:
    done("--recipe", "a.toml")
    Path("a.toml").unlink()
    if change == "folder":
        Path("a.toml").mkdir()
    if change == "broken":
        Path("a.toml").write_text("[data")
    with pytest.raises(UserError) as error:
        command()
    said = "a.toml is not valid TOML" if change == "broken" else "run/run.json remembers recipe a.toml, which does not"
    assert said in str(error.value)


def test_a_remembered_setting_that_is_wrong_is_blamed_on_the_memory(house: Path) -> None:
    done("--recipe", "a.toml", "--set", "data.dialect=tar")
    wrong = (
        r"^run/run\.json: data\.dialect = 'tar': Input should be 'auto', .*; take it out of run/run\.json, or type anot"
    )
    with pytest.raises(UserError, match=wrong):
        command().recipe.table("data", DataConfig)
    done("--set", "data.dialect=auto", "--set", "data.dialekt=sa1b")
    with pytest.raises(UserError, match=r"did you mean data\.dialect\?\); take it out of run/run\.json$"):
        command().recipe.table("data", DataConfig)
    with pytest.raises(UserError, match=r"^--set: .*did you mean data\.dialect\?\)$"):
        command("--set", "data.dialekt=sa1b").recipe.table("data", DataConfig)


def test_a_key_that_is_typed_again_in_other_quotes_wins(house: Path) -> None:
    done("--recipe", "a.toml", "--set", 'sampling."num_steps"=8')
    done("--set", "sampling.num_steps=9")
    done("--set", "sampling.'seed'=5")
    done("--set", "sampling.seed=6")
    assert memory()["settings"] == {"sampling.num_steps": "9", "sampling.seed": "6"}
    Path("run", MEMORY_NAME).write_text(json.dumps(memory() | {"settings": {'sampling."num_steps"': "7"}}))
    assert command().recipe.tables["sampling"]["num_steps"] == 7
    assert done("--set", "sampling.num_steps=10").recipe.tables["sampling"]["num_steps"] == 10
    assert command().recipe.tables["sampling"]["num_steps"] == 10


@pytest.mark.parametrize("empty", ["", "  "])
def test_a_run_or_recipe_of_no_name_is_refused(house: Path, empty: str) -> None:
    with pytest.raises(UserError, match=r"^RECIPE is empty: type a value, or leave it out"):
        command("--recipe", empty)
    with pytest.raises(UserError, match=r"^RUN is empty: type a value, or leave it out"):
        parse_command("room", "", argv=["--run", empty])


def test_a_recipe_inside_the_run_moves_with_it(house: Path) -> None:
    Path("run").mkdir()
    Path("a.toml").rename("run/recipe.toml")
    done("--recipe", "run/recipe.toml", "--set", "sampling.seed=7")
    assert memory()["recipe"] == "recipe.toml"
    done("--recipe", "run/recipe.toml", "--set", "sampling.size=8x8")
    assert memory()["settings"] == {"sampling.seed": "7", "sampling.size": "8x8"}, "it is the same recipe"
    Path("run").rename("other")
    moved = parse_command("room", "", argv=["--run", "other"])
    assert moved.recipe.path == Path("other/recipe.toml") and moved.recipe.tables["sampling"]["seed"] == 7


def test_a_shipped_recipe_is_remembered_by_name_as_its_environment_may_move(house: Path) -> None:
    done("--recipe", "toyworld", "--set", "sampling.seed=7")
    assert memory()["recipe"] == "toyworld"
    assert command().recipe.path == find_recipe("toyworld")
    done("--recipe", "recipes/toyworld.toml", "--set", "sampling.size=8x8")
    assert memory()["settings"] == {"sampling.seed": "7", "sampling.size": "8x8"}, "it is the same recipe"


def test_a_damaged_memory_is_named(house: Path) -> None:
    done("--recipe", "a.toml")
    for content in ("{", '{"recipe": 3}', '{"recpie": "a.toml"}'):
        Path("run", MEMORY_NAME).write_text(content)
        with pytest.raises(UserError, match=r"run/run\.json is damaged.*remove it, and type RECIPE"):
            command()


def test_verify_finds_a_memory_that_no_command_would_take(house: Path) -> None:
    done("--recipe", "a.toml")
    ShardDirectory(Path("run", "captions")).write_manifest(Fingerprint.of({}), [], upstream={}, extra={})
    assert verify_run(Path("run")).problems == []
    for content in ("{", '{"recipe": 3}', '{"recpie": "a.toml"}'):
        Path("run", MEMORY_NAME).write_text(content)
        (problem,) = verify_run(Path("run")).problems
        assert "run.json is damaged" in problem.text
        assert problem.mend == "`rm run/run.json`, and give RECIPE and SHARDS with the next command again"


def test_shards_are_typed_once_for_every_room(house: Path, capsys) -> None:
    done("--recipe", "a.toml", "--text", "SHARDS:data.shards=x.tar")
    assert command().raw_shards == [str(house / "x.tar")]
    assert "1 raw shard as remembered in run/run.json" in " ".join(capsys.readouterr().err.split())
    assert command("--recipe", "b.toml").raw_shards == [str(house / "x.tar")]
    with_own = command("--recipe", "b.toml", "--set", "sampling.seed=3")
    assert "shards" not in with_own.recipe.tables.get("data", {})


def test_typed_shards_win_over_remembered_ones_and_those_over_the_recipes(house: Path, capsys) -> None:
    Path("a.toml").write_text(RECIPE + '[data]\nshards = "y.tar"\n')
    assert command("--recipe", "a.toml").raw_shards == ["y.tar"]
    done("--recipe", "a.toml", "--set", "data.shards=x.tar")
    assert memory()["settings"] == {}
    assert command().raw_shards == [str(house / "x.tar")]
    capsys.readouterr()
    assert done("--text", "data.shards=y.tar").raw_shards == ["y.tar"]
    assert "1 raw shard as typed; without x of run/run.json" in " ".join(capsys.readouterr().err.split())
    assert command().raw_shards == [str(house / "x.tar"), str(house / "y.tar")]


def test_remembered_shards_that_have_moved_are_named_and_typing_their_place_heals_the_run(house: Path, capsys) -> None:
    done("--recipe", "a.toml", "--text", "SHARDS:data.shards=x.tar,y.tar")
    Path("new").mkdir()
    Path("x.tar").rename("new/z.tar")
    message = (
        rf"^run/run\.json remembers 1 raw shard of 2 that is not there any more: {house}/x\.tar; .* SHARDS with where"
    )
    for plan in ((), ("--plan",)):
        with pytest.raises(MissingFileError, match=message):
            _ = command(*plan).raw_shards
    capsys.readouterr()
    assert done("--text", "SHARDS:data.shards=new/z.tar").raw_shards == ["new/z.tar"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"takes the place of {house}/x.tar of run/run.json, not there any more" in said and "without y of" in said
    assert memory()["shards"] == {"y": f"{house}/y.tar", "z": f"{house}/new/z.tar"}
    assert command().raw_shards == [f"{house}/y.tar", f"{house}/new/z.tar"]


def test_typed_shards_that_are_not_there_are_refused_by_a_room_that_reads_none(house: Path, monkeypatch) -> None:
    for plan in ([], ["--plan"]):
        typed = ["--recipe", "a.toml", "--run", "run", "--text", "SHARDS:data.shards=/nope", *plan]
        monkeypatch.setattr("sys.argv", ["training", *typed])
        with pytest.raises(MissingFileError, match=r"^data\.shards: no shard matches /nope"):
            training_main()


def test_runs_of_before_know_their_shards_by_what_was_found(house: Path) -> None:
    with pytest.raises(UserError, match="no raw shards are named: type SHARDS="):
        _ = command("--recipe", "a.toml").raw_shards
    Path("run").mkdir()
    Path("run", "shards.json").write_text(json.dumps({"x": str(house / "x.tar")}))
    assert command("--recipe", "a.toml").raw_shards == recall_shards(Path("run")) == [str(house / "x.tar")]
    done("--recipe", "a.toml")
    Path("run", "shards.json").unlink()
    assert memory()["found"] == {"x": str(house / "x.tar")}, "once there is something to note, in one file"
    Path("x.tar").unlink()
    with pytest.raises(MissingFileError, match=r"^run/run\.json remembers 1 raw shard of 1 that is not there"):
        _ = command("--recipe", "a.toml").raw_shards


def test_one_file_has_what_was_typed_and_what_was_found(house: Path) -> None:
    """Of a shard that has moved and is typed anew, no memory keeps the place where it was."""
    done("--recipe", "a.toml")
    remember_found(Path("run"), ["x.tar", "y.tar"])
    assert recall_shards(Path("run")) == [f"{house}/x.tar", f"{house}/y.tar"] and memory()["shards"] == {}
    Path("new").mkdir()
    Path("x.tar").rename("new/x.tar")
    done("--recipe", "a.toml", "--text", "SHARDS:data.shards=new/x.tar")
    assert recall_shards(Path("run")) == [f"{house}/new/x.tar", f"{house}/y.tar"]
    assert memory()["shards"] == {"x": f"{house}/new/x.tar"} and memory()["found"] == {"y": f"{house}/y.tar"}
    remember_found(Path("run"), ["new/x.tar"])
    assert memory()["found"] == {"y": f"{house}/y.tar"}


def test_shards_in_the_run_are_named_from_the_run_and_move_with_it(house: Path) -> None:
    Path("run/raw").mkdir(parents=True)
    for name in ("x", "z"):
        Path("run/raw", f"{name}.tar").write_bytes(b"")
    done("--recipe", "a.toml", "--text", f"SHARDS:data.shards={house}/run/raw/x.tar")
    remember_found(Path("run"), ["run/raw/z.tar", "y.tar"])
    assert memory()["shards"] == {"x": "raw/x.tar"} and memory()["found"] == {"z": "raw/z.tar", "y": f"{house}/y.tar"}
    assert command().raw_shards == ["run/raw/x.tar"]
    assert recall_shards(Path("run")) == ["run/raw/x.tar", f"{house}/y.tar", "run/raw/z.tar"]
    former = {name: f"{house}/run/raw/{name}.tar" for name in ("x", "z")}
    Path("run", MEMORY_NAME).write_text(json.dumps(memory() | {"shards": former}))
    assert command().raw_shards == ["run/raw/x.tar", "run/raw/z.tar"], "of a run of before"
    done("--text", "SHARDS:data.shards=y.tar")
    Path("run").rename("moved")
    assert recall_shards(Path("moved")) == ["moved/raw/x.tar", f"{house}/y.tar", "moved/raw/z.tar"]
    Path("moved/raw/x.tar").unlink()
    with pytest.raises(MissingFileError, match=r"^moved/run\.json remembers .* not there any more: moved/raw/x\.tar;"):
        _ = parse_command("room", "", argv=["--run", "moved"]).raw_shards


def test_the_only_stage_needs_no_name(house: Path) -> None:
    assert command("--recipe", "a.toml", has_stages=True).stage == "one"
    with pytest.raises(UserError, match=r"say which stage, .*\[training\] in a\.toml are: one, two"):
        command("--recipe", "a.toml", "--set", "training.two.num_steps=3", has_stages=True)


def test_parts_of_a_command_take_it_as_it_was_understood(house: Path, capsys) -> None:
    done("--recipe", "a.toml", "--set", "sampling.seed=7")
    whole = command("--set", "training.{stage}.num_steps=5", "--text", "sampling.prompt=a=b", has_stages=True)
    done("--set", "sampling.seed=9")
    capsys.readouterr()
    part = parse_command("rank", "", argv=whole.words, has_stages=True)
    assert (part.recipe.tables, part.stage, part.run) == (whole.recipe.tables, "one", whole.run)
    part.remember()
    assert capsys.readouterr().err == "" and memory()["settings"] == {"sampling.seed": "9"}


def test_commands_at_the_same_time_keep_what_each_has_typed(house: Path) -> None:
    done("--recipe", "a.toml")
    children = []
    for number in range(6):
        if not (child := os.fork()):
            done("--set", f"sampling.key{number}={number}")
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert memory()["settings"] == {f"sampling.key{number}": str(number) for number in range(6)}


def test_a_command_killed_while_it_notes_leaves_what_was_noted(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done("--recipe", "a.toml", "--set", "sampling.seed=7").run
    found = command("--set", "sampling.seed=8")
    child = os.fork()
    if not child:
        monkeypatch.setattr("os.replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        monkeypatch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        monkeypatch.setattr(Path, "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        found.remember()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert memory()["settings"] == {"sampling.seed": "7"}
    found.remember()
    assert sorted(path.name for path in before.iterdir()) == [".run.lock", "run.json"]

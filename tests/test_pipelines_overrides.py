"""`table.key=value` as typed behind `--set` and SET."""

import re

import pytest

from captioning.config import CaptioningConfig
from errors import UserError
from pipelines.command import parse_command, run_command
from pipelines.overrides import Setting, apply_setting, split_settings
from pipelines.recipe import load_recipe


def read(text: str) -> dict[str, object]:
    """What a text of settings becomes, by dotted key of two parts."""
    tables: dict = {}
    for setting in split_settings(text):
        apply_setting(tables, Setting(text=setting), stage="stage2")
    return {f"{table}.{key}": value for table, content in tables.items() for key, value in content.items()}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", {}),
        ("  a.b=1 \n a.c=true  ", {"a.b": 1, "a.c": True}),
        ('a.b="low quality" a.c=2', {"a.b": "low quality", "a.c": 2}),
        ("a.b=low quality, it's bad a.c=2", {"a.b": "low quality, it's bad", "a.c": 2}),
        ("a.b=it's a.c=it's", {"a.b": "it's", "a.c": "it's"}),
        ('a.b="x c.d=1 e.f=2" g.h=3', {"a.b": "x c.d=1 e.f=2", "g.h": 3}),
        ("a.b=['x y', 'c.d=1'] g.h=3", {"a.b": ["x y", "c.d=1"], "g.h": 3}),
        ('a.b=[{c="d e"}] g.h=["*"]', {"a.b": [{"c": "d e"}], "g.h": ["*"]}),
        ('a.b={"x_*" = "What is this?"} c.d=1', {"a.b": {"x_*": "What is this?"}, "c.d": 1}),
        ("a.b=width.x == 3 and y a.c=1", {"a.b": "width.x == 3 and y", "a.c": 1}),
        ("a.b = 1 a.c = [2]", {"a.b": 1, "a.c": [2]}),
        ("a.b='Describe this image in one sentence'", {"a.b": "Describe this image in one sentence"}),
        ("a.b=Describe this image, in one = sentence", {"a.b": "Describe this image, in one = sentence"}),
        ("a.b='$5, [x] {y}' a.c=2", {"a.b": "$5, [x] {y}", "a.c": 2}),
        ("a.b=[INST] {x} [/INST] a.c=2", {"a.b": "[INST] {x} [/INST]", "a.c": 2}),
        ("a.b=", {"a.b": ""}),
        ("a.b=1 # one", {"a.b": "1 # one"}),
        ("a.b=1, 2", {"a.b": "1, 2"}),
        ("a.b=1,", {"a.b": "1,"}),
        ("a.b=1\nc = 2", {"a.b": "1\nc = 2"}),
        ("a.b=http://x.y/?c.d=1", {"a.b": "http://x.y/?c.d=1"}),
    ],
)
def test_a_text_of_settings_is_cut_where_the_next_one_begins(text, settings) -> None:
    assert read(text) == settings


def test_stages_are_named_in_any_of_them() -> None:
    tables: dict = {"training": {"stage2": {}}}
    for setting in split_settings("training.{stage}.num_steps=5 training.stage2.name=a b"):
        apply_setting(tables, Setting(text=setting), stage="stage2")
    assert tables == {"training": {"stage2": {"num_steps": 5, "name": "a b"}}}


@pytest.mark.parametrize("text", ["word", "word a.b=1", "=1", "a=1 b.c=2"])
def test_what_is_no_setting_is_refused_as_typed(text) -> None:
    with pytest.raises(UserError, match="is not of the form"):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a.b="open a.c=1', 'a.b = "open: the quote " is not closed'),
        ("a.b='Describe this", "a.b = 'Describe this: the quote ' is not closed"),
        ("a.c=1 a.b='Describe the dog's coat'", "a.b = 'Describe the dog's coat': between the first ' and the last"),
        ('a.b="a \\q"', "between the first"),
        ("a.b=[1, 2 a.c=3", "a.b = [1, 2: the bracket [ is not closed"),
        ('a.b={x = "y" a.c=3', "the bracket { is not closed"),
        ('a.b="hello" # world', 'a.b = "hello" # world: behind the last " stands # world, which is no table.key=value'),
        ("a.c=1 a.b='x' PLAN=1", "a.b = 'x' PLAN=1: behind the last ' stands PLAN=1, which is no"),
    ],
)
def test_quotes_and_brackets_that_are_not_closed_are_refused_by_name(text, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(text)


def test_parts_of_a_key_may_stand_in_quotes() -> None:
    tables: dict = {}
    for setting in split_settings("a.p.\"sa_*\"='x' a.p.'b.c=d' = 2 a.p.e_*=3"):
        apply_setting(tables, Setting(text=setting), stage=None)
    assert tables == {"a": {"p": {"sa_*": "x", "b.c=d": 2, "e_*": 3}}}


def test_a_key_is_the_same_in_whatever_quotes_its_parts_stand() -> None:
    for text in ('a."b"=1', "a.'b'=1", '"a".b = 1', "a.b=1"):
        assert Setting(text=text).key == "a.b"
    assert {Setting(text=text).key for text in ("a.'b.c=d'=1", 'a."b.c=d"=1')} == {'a."b.c=d"'}
    assert Setting(text="a.'b\"c'=1").key == "a.'b\"c'"


def test_settings_win_over_the_recipe_and_what_has_a_flag_over_both(tmp_path) -> None:
    (tmp_path / "r.toml").write_text("[sampling]\nseed = 1\n")
    typed = ["--set", "sampling.seed=2", "--settings", "sampling.seed=2 sampling.size=4", "--text", "sampling.size=5"]
    command = parse_command("sampling", "", argv=["--recipe", str(tmp_path / "r.toml"), "--run", "x", *typed])
    assert command.recipe.tables == {"sampling": {"seed": 2, "size": "5"}}


@pytest.mark.parametrize(
    "typed",
    [
        ("--settings", "training.one.num_steps=2 training.one.num_steps=3"),
        ("--set", "training.one.num_steps=2", "--set", 'training."one".num_steps=3'),
        ("--settings", "training.{stage}.num_steps=2 training.one.num_steps=3"),
    ],
)
def test_a_key_that_is_typed_twice_is_refused_by_name(tmp_path, typed) -> None:
    (tmp_path / "r.toml").write_text("[training.one]\n")
    with pytest.raises(UserError, match=r"^(SET|--set): training\.one\.num_steps is typed twice, as 2 and as 3: leave"):
        parse_command("x", "", argv=["--recipe", f"{tmp_path}/r.toml", "--run", "x", *typed], has_stages=True)


def refuse(argv) -> None:
    parse_command("sampling", "", argv=argv)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[data", b"a = " + b"[" * 2000])
def test_recipes_that_are_none_are_refused(tmp_path, content, capsys) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(content)
    argv = ["--recipe", str(recipe), "--run", "x"]
    assert run_command("sampling", lambda: refuse(argv)) == 2
    assert f"{recipe} is not valid TOML" in capsys.readouterr().err


def test_a_folder_is_no_recipe_and_words_are_utf8(tmp_path) -> None:
    with pytest.raises(UserError, match=r"recipe .* cannot be read: Is a directory"):
        parse_command("sampling", "", argv=["--recipe", str(tmp_path), "--run", "x"])
    with pytest.raises(UserError, match="in another encoding than UTF-8"):
        parse_command("sampling", "", argv=["--recipe", str(tmp_path), "--run", "x\udcff"])


def test_spaces_around_the_equals_sign_belong_to_no_value(tmp_path) -> None:
    (tmp_path / "r.toml").write_text("")
    for text in ("sampling.prompt = a cat", "sampling.prompt=a cat", "sampling.prompt = 'a cat'"):
        assert load_recipe(tmp_path / "r.toml", [text]).tables["sampling"] == {"prompt": "a cat"}
    assert load_recipe(tmp_path / "r.toml", ["sampling.prompt= a cat"]).tables["sampling"] == {"prompt": " a cat"}


def test_a_value_that_is_wrong_as_a_whole_is_blamed_on_what_was_typed_into_it(tmp_path) -> None:
    (tmp_path / "r.toml").write_text("")
    recipe = load_recipe(tmp_path / "r.toml", ["captioning.prompts.default=a {b}"])
    with pytest.raises(UserError, match=r"^--set: captioning\.prompts = .* may hold \{alt_text\} and no other"):
        recipe.table("captioning", CaptioningConfig)

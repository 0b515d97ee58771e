"""`atelier`: what is typed behind a sub-command, or behind a target of make, is what its room gets."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from atelier import door
from atelier.commands import FLAGS, SUBCOMMANDS
from atelier.door import main, room_words
from atelier.typed import variables_of
from errors import UserError
from pipelines.as_typed import variable
from pipelines.command import parse_command
from pipelines.recipe_files import find_recipe, shipped_recipes

REPOSITORY = Path(__file__).resolve().parent.parent
VALUE = "it's \"5\" $5 $(HOME) # 'x'  [y], {0..1}"
# What the room of a sub-command is to be given for a flag.
GIVEN = {
    "shards": ("caption", ["--text", f"SHARDS:data.shards={VALUE}"]),
    "retry": ("caption", ["--once", "RETRY:captioning.retry_rejects=true"]),
    "passes": ("caption", ["--text", f"PASSES:captioning.only={VALUE}"]),
    "plan": ("caption", ["--plan"]),
    "run": ("verify", [f"--run={VALUE}"]),
    "sets": ("stats", ["--text", f"SETS:dataset_stats.sets={VALUE}"]),
    "sample": ("stats", ["--once", f"SAMPLE:dataset_stats.sample={VALUE}"]),
    "stage": ("train", [f"--stage={VALUE}"]),
    "phase": ("train", [f"--phase={VALUE}"]),
    "gpus": ("train", ["--once", f"GPUS:training.num_processes={VALUE}"]),
    "hostfile": ("train", ["--text", f"HOSTFILE:training.hostfile={VALUE}"]),
    "remote-shell": ("train", ["--text", f"REMOTE_SHELL:training.remote_shell={VALUE}"]),
    "from-scratch": ("train", ["--once", "FROM_SCRATCH:training.{stage}.starts_from=scratch"]),
    "prompt": ("sample", ["--text", f"PROMPT:sampling.prompt={VALUE}"]),
    "prompts": ("sample", ["--text", f"PROMPTS:sampling.prompts={VALUE}"]),
    "n": ("sample", ["--once", f"N:sampling.images_per_prompt={VALUE}"]),
    "steps": ("sample", ["--once", f"STEPS:sampling.num_steps={VALUE}"]),
    "cfg": ("sample", ["--once", f"CFG:sampling.guidance_scale={VALUE}"]),
    "seed": ("sample", ["--once", f"SEED:sampling.seed={VALUE}"]),
    "size": ("sample", ["--text", f"SIZE:sampling.size={VALUE}"]),
    "lora": ("sample", ["--text", f"LORA:sampling.lora={VALUE}"]),
    "weights": ("sample", ["--text", f"WEIGHTS:sampling.lora_weights={VALUE}"]),
    "styles": ("sample", ["--text", f"STYLES:sampling.styles={VALUE}"]),
    "control": ("sample", ["--text", f"CONTROL:sampling.control={VALUE}"]),
    "photo": ("sample", ["--once", "PHOTO:sampling.control_is=photo"]),
    "control-kind": ("sample", ["--text", f"CONTROL_KIND:sampling.control_kind={VALUE}"]),
    "strength": ("sample", ["--once", f"STRENGTH:sampling.control_strength={VALUE}"]),
    "branch": ("sample", ["--text", f"BRANCH:sampling.control_branch={VALUE}"]),
    "task": ("eval", [VALUE]),
    "reference": ("eval", ["--text", f"REFERENCE:evaluation.reference={VALUE}"]),
    "clip": ("eval", ["--text", f"CLIP:evaluation.clip={VALUE}"]),
    "inception": ("eval", ["--text", f"INCEPTION:evaluation.inception={VALUE}"]),
    "port": ("app", ["--once", f"PORT:app.port={VALUE}"]),
    "table": ("recipe", ["atelier.keys", VALUE]),
    "from": ("convert", ["training.convert", VALUE]),
    "to": ("convert", ["b", VALUE]),
    "reparameterize": ("convert", ["--reparameterize"]),
    "ema": ("convert", [f"--ema={VALUE}"]),
    "pipeline": ("convert", ["--pipeline"]),
}
NEEDED = {"from": "b", "to": "b"}


def needed(name: str, *, without: str = "") -> dict[str, str]:
    return {flag: NEEDED[flag] for flag, _ in SUBCOMMANDS[name].required if flag != without}


def is_part(part: list[str], words: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words)))


def words_of_make(monkeypatch, name: str, values: dict[str, str]) -> list[str]:
    for each, value in values.items():
        monkeypatch.setenv(each, value)
    return room_words([name, "--from-make", " ".join(values)])


@pytest.mark.parametrize("flag", sorted(set(FLAGS) - {"recipe", "set"}))
def test_a_flag_and_its_variable_reach_the_room_whole(monkeypatch, flag) -> None:
    name, part = GIVEN[flag]
    others = needed(name, without=flag)
    typed = [word for other, value in others.items() for word in (f"--{other}", value)]
    is_switch = FLAGS[flag].is_switch
    words = room_words([name, *typed, f"--{flag}", *([] if is_switch else [VALUE])])
    assert words[0] == SUBCOMMANDS[name].module and is_part(part, words)
    values = {variable(other): value for other, value in others.items()}
    assert words_of_make(monkeypatch, name, values | {variable(flag): "1" if is_switch else VALUE}) == words
    if is_switch:
        for off in ("", "0"):
            assert not is_part(part, words_of_make(monkeypatch, name, values | {variable(flag): off}))


def test_every_flag_is_tried_here_and_every_sub_command_is_a_target() -> None:
    assert set(GIVEN) | {"recipe", "set"} == set(FLAGS)
    assert set().union(*map(variables_of, SUBCOMMANDS)) == set(map(variable, FLAGS))


@pytest.mark.parametrize("value", ["-x", "--plan", "-1"])
def test_a_value_may_look_like_a_flag_of_make(monkeypatch, value) -> None:
    words = words_of_make(monkeypatch, "sample", {"STAGE": "2", "PROMPT": value})
    assert ("--text", f"PROMPT:sampling.prompt={value}") in itertools.pairwise(words)


def test_settings_are_laid_over_the_recipe_below_what_has_a_flag(monkeypatch, tmp_path) -> None:
    (tmp_path / "r.toml").write_text("")
    said = "captioning.prompts.default='Describe this image in one sentence' data.shards=/other engine.num_workers=2"
    for words in (
        words_of_make(monkeypatch, "caption", {"SET": said, "SHARDS": "/d", "RECIPE": f"{tmp_path}/r.toml"}),
        room_words(
            [
                *(
                    "caption",
                    "--recipe",
                    f"{tmp_path}/r.toml",
                    "--set",
                    "data.shards=/other",
                    "--shards",
                    "/d",
                    "--set",
                ),
                *("captioning.prompts.default=Describe this image in one sentence", "--set", "engine.num_workers=2"),
            ]
        ),
    ):
        assert parse_command("captioning", "", argv=words[1:]).recipe.tables == {
            "captioning": {"prompts": {"default": "Describe this image in one sentence"}},
            "data": {"shards": "/d"},
            "engine": {"num_workers": 2},
        }


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["capton"], "there is no 'capton' (did you mean caption?)"),
        (["caption", "--shard", "x"], r"caption takes no --shard \(did you mean --shards\?\)"),
        (["caption", "--shards=a", "b.tar"], "caption takes no b.tar"),
        (["train", "FROM_SCRATCH=1"], r"train takes no FROM_SCRATCH=1 \(did you mean --from-scratch\?\)"),
        (["stats", "--stage", "2"], "stats takes no --stage"),
        (["stats", "--run", ""], "--run is empty: type a value, or leave it out"),
        (["caption", "--shards= "], "--shards is empty"),
        (["pack", "--shards", "a", "--to", ""], "--to is empty"),
        (["caption", "--shards", "a", "--shards=b"], "--shards is typed twice, as a and as b: leave one out"),
        (["convert", "--from", "a", "--to", "b", "--to", "c"], "--to is typed twice, as b and as c"),
        (["convert", "--from-make", ""], "convert needs FROM, for example FROM=facebook/DiT-XL-2-256"),
        (["convert", "--from", "a"], "convert needs --to, for example --to dit"),
    ],
)
def test_what_is_not_known_or_missing_is_said(typed, message) -> None:
    with pytest.raises(UserError, match=message.replace("'capton' (did you mean caption?)", "'capton' .did you")):
        room_words(typed)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.stage2.num_stpes=3", "num_stpes is not a known key (did you mean training.stage2.num_steps?)"),
        ("training.stage2.num_steps=many", "training.stage2.num_steps = 'many'"),
        ("sampling.solver=euler9", "sampling.solver = 'euler9'"),
        ("app.prot=3", "app.prot is not a known key (did you mean app.port?)"),
        ("training.staeg2.num_steps=3", "has no [training.staeg2] (did you mean stage2?); a new one says"),
        ("features.mine.extends=stage9", "features.mine.extends = 'stage9' names no table of [features]"),
        (
            "engine.max_reject_fraction=0.3",
            "engine.max_reject_fraction is not a known key (did you mean captioning.max_reject_fraction, "
            "columns.max_reject_fraction, dataset_stats.max_reject_fraction, "
            "features.max_reject_fraction or evaluation.max_reject_fraction?)",
        ),
        ("training.stage2.num_heads=3", "num_heads is not a known key (did you mean model.num_heads?)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["caption", "train"])
def test_a_setting_of_any_room_is_refused_when_it_is_typed(tmp_path, name, setting, message) -> None:
    stage = ["--stage=3"] if name == "train" else []
    words = [name, "--recipe", "toyworld", "--run", str(tmp_path / "run"), *stage]
    door.require_sound_settings([*words, "--set", "training.mine.extends=stage2", "--set", "training.mine.num_steps=3"])
    with pytest.raises(UserError) as refused:
        door.require_sound_settings([*words, "--set", setting])
    assert str(refused.value).startswith("--set: ") and message in str(refused.value)
    (tmp_path / "run").mkdir()
    key, _, value = setting.partition("=")
    memory = {"recipe": str(find_recipe("toyworld")), "settings": {key: value}, "shards": {}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(memory))
    remembered = [name, "--run", str(tmp_path / "run"), *stage]
    if "has no" not in message:
        with pytest.raises(UserError, match=r"run\.json: .*"):
            door.require_sound_settings(remembered)


@pytest.mark.parametrize("name", ["caption", "train"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("captioning.prompts.default=a cat PLAN=1", "= a cat PLAN=1: PLAN=1 stands in this text; type it outside"),
        ("captioning.prompts.default=a cat --plan", "--plan stands in this text"),
        ("captioning.model=[INST] SHARDS=x", "SHARDS=x stands in this text"),
        ("max_pixels=100", "'max_pixels=100' names no table (did you mean data.max_pixels or evaluation.max_pixels?)"),
    ],
)  # fmt: skip
def test_a_flag_or_key_that_a_setting_would_swallow_is_refused(tmp_path, name, setting, message) -> None:
    words = [name, "--recipe", "toyworld", "--run", str(tmp_path / "run")]
    with pytest.raises(UserError) as refused:
        door.require_sound_settings([*words, "--set", setting])
    assert str(refused.value).startswith("--set: ") and message in str(refused.value)
    for sound in ("captioning.prompts.default='a cat PLAN=1'", "captioning.prompts.default=a cat plan=1 X=2 --y"):
        door.require_sound_settings([*words, "--set", sound])


def test_a_new_table_needs_no_start_for_its_own_command(tmp_path) -> None:
    words = ["--recipe", "toyworld", "--run", str(tmp_path / "run"), "--set", "features.mine.resolution=64"]
    door.require_sound_settings(["features", *words, "--stage", "mine"])
    with pytest.raises(UserError, match=r"has no \[features\.mine\]"):
        door.require_sound_settings(["features", *words, "--stage", "stage2"])


def test_further_options_of_a_room_are_passed_on() -> None:
    typed = ["convert", "--from", "a", "--to", "b", "--adaln", "per-block", "--seed", "3"]
    assert room_words(typed) == ["training.convert", "a", "b", "--adaln", "per-block", "--seed", "3"]
    assert room_words(["nltk-data", "--url", "u"]) == ["dataset_stats.tagging.nltk_data", "--url", "u"]


def test_recipes_are_found_by_name_where_no_file_is_meant(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toyworld").mkdir()
    shipped = {path.stem: path for path in shipped_recipes()}
    assert shipped["toyworld"].read_bytes() == (REPOSITORY / "recipes" / "toyworld.toml").read_bytes()
    for text in ("toyworld", "toyworld.toml", "recipes/toyworld.toml"):
        assert find_recipe(text) == shipped["toyworld"]
    with pytest.raises(UserError, match=r"pixart-alhpa does not exist; the shipped ones are .*pixart-alpha"):
        parse_command("captioning", "", argv=["--run", "x", "--recipe", "pixart-alhpa"])
    (tmp_path / "toyworld.toml").touch()
    assert find_recipe("toyworld.toml") == Path("toyworld.toml") and find_recipe("toyworld") == shipped["toyworld"]


def test_help_lists_every_sub_command_and_flag(capsys) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in SUBCOMMANDS)
    for name in SUBCOMMANDS:
        if not SUBCOMMANDS[name].flags:
            continue
        with pytest.raises(SystemExit, match="0"):
            room_words([name, "--help"])
        shown = capsys.readouterr().out
        assert all(f" --{flag} " in shown for flag in SUBCOMMANDS[name].flags)
        assert shown.startswith(f"usage: atelier {name} ")


def test_a_room_answers_with_its_own_words_and_status(tmp_path) -> None:
    command = [sys.executable, "-m", "atelier", "caption", "--recipe", "toyworld", "--plan", "--run", str(tmp_path)]
    done = subprocess.run([*command, "--shards", "/nope"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("captioning: data.shards: no shard matches /nope")

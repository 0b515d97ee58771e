"""What is typed behind a make target is what its command gets, whole or not at all; what the shell exports is not."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from house_of_make import make_house

from atelier.commands import FLAGS, SUBCOMMANDS
from atelier.typed import VARIABLES, Word, find_wrong, read_words, show_help, variables_of
from pipelines.as_typed import variable

REPOSITORY = Path(__file__).resolve().parent.parent
RECORD = """\
mkdir busy || echo "two at once" >> all
printf '%s\\0' "$@" > asked
env -0 > environment
echo "$*|$RUN|$SET" >> all
rmdir busy
"""
TEXTS = [
    "a sign that says $5 off",
    "it costs $(HOME), $$ and ${PATH}",
    "an open $(",
    '"hello"',
    '"a red circle" # at night',
    "1984",
    "it's \\ `echo no` && *",
    "two\nlines",
    "[INST] {a}, b; c | d > e",
    "~/my [2024] set/{0..1}.tar",
    "-x",
    "a=b  SHARDS=c ",
]
TARGETS = [
    *SUBCOMMANDS,
    "help",
    "demo",
    "demo-paper",
    "demo-raw",
    "demo-dreambooth",
    "demo-vae",
    "demo-control",
    "demo-lcm",
    "demo-curation",
    "paper",
    "test",
    "zoo",
    "bench-gpu",
    "bench-cache",
    "bench-quality",
]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with the Makefile."""
    return make_house(tmp_path_factory.mktemp("house"), RECORD)


def run_make(house: Path, *typed: str, exported: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | (exported or {})
    command = ["make", "--no-print-directory", *typed]
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False)


def asked(house: Path, *typed: str, exported: dict[str, str] | None = None) -> tuple[list[str], dict[str, str]]:
    """What the command of a target is asked to do, and its environment."""
    done = run_make(house, *typed, exported=exported)
    assert done.returncode == 0, done.stderr
    environment = (line.partition("=") for line in (house / "environment").read_text().split("\0"))
    return (house / "asked").read_text().split("\0")[:-1], {name: value for name, _, value in environment}


def values_of(target: str) -> dict[str, str]:
    """A value for each variable of a target, in which nothing may be read by make or a shell."""
    return {name: f"{name} it's \"5\" $5 $(HOME) # 'x'  y" for name in variables_of(target)}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_as_it_was_typed(house, text) -> None:
    words, environment = asked(house, "sample", "STAGE=2", f"PROMPT={text}")
    assert words[:4] == ["-m", "atelier", "sample", "--from-make"] and set(words[4].split()) == {"STAGE", "PROMPT"}
    assert environment["PROMPT"] == text


@pytest.mark.parametrize("target", sorted(set(SUBCOMMANDS) - {"nltk-data"}))
def test_every_variable_of_a_target_arrives_as_it_was_typed(house, target) -> None:
    values = values_of(target)
    words, environment = asked(house, target, *(f"{name}={value}" for name, value in values.items()))
    assert words[2] == target and set(words[4].split()) == set(values)
    assert {name: environment[name] for name in values} == values


def test_benchmarks_get_theirs_as_they_were_typed(house) -> None:
    assert asked(house, "bench-gpu", "PARTS=a 'b' $5", "TINY=1")[0][1:] == ["benchmarks.gpu", "a 'b' $5", "--tiny"]
    assert asked(house, "bench-gpu", "TINY=0")[0][1:] == ["benchmarks.gpu"]
    assert asked(house, "bench-cache", "RUN=my run")[0][1:] == ["benchmarks.cache", "--run", "my run"]
    assert asked(house, "bench-quality", "SEEDS=3")[0][1:] == ["benchmarks.quality", "--seeds", "3"]
    assert asked(house, "bench-quality")[0][1:] == ["benchmarks.quality"]


@pytest.mark.parametrize("target", ["caption", "train", "bench-gpu"])
def test_what_the_shell_exports_is_neither_taken_nor_refused(house, target) -> None:
    names = [*map(variable, FLAGS), "PARTS", "TINY", "FOO", "shards"]
    words, environment = asked(house, target, exported=dict.fromkeys(names, "%n@%m") | {"PYTHONSAFEPATH": "1"})
    assert words == asked(house, target)[0]
    # But programs that ours start, such as a remote shell, read it where it is theirs.
    assert {environment[name] for name in names} == {"%n@%m"} and "PYTHONSAFEPATH" not in environment


def test_a_make_inside_a_make_passes_settings_on(house) -> None:
    """As `make demo` does, with what is typed behind it; what the outer one's targets take is theirs to say."""
    (house / "outer.mk").write_text("outer:\n\t@$(MAKE) -f Makefile RUN=x caption\n")
    words, environment = asked(house, "-f", "outer.mk", "outer", "SET=sampling.prompt=it's $5 off", "RUN=y", "FOO=1")
    assert {"RUN", "SET"} <= set(words[4].split())
    assert (environment["RUN"], environment["SET"]) == ("x", "sampling.prompt=it's $5 off")


def steps_of(house: Path, *typed: str, exported: dict[str, str] | None = None) -> list[str]:
    """All that a target's steps are asked to do, in their order."""
    (house / "all").unlink(missing_ok=True)
    done = run_make(house, *typed, exported=exported)
    assert done.returncode == 0, done.stderr
    return (house / "all").read_text().splitlines()


def test_the_demo_takes_its_steps_one_by_one_whatever_jobs_are_typed(house) -> None:
    steps = steps_of(house, "demo")
    each = ["features", "train", "sample"]
    assert [step.split()[2] for step in steps] == [
        *("world", "caption", "stats", *each, *each, *each, "judge", "eval", "eval", "report")
    ]
    assert steps_of(house, "-j4", "demo") == steps_of(house, "-s", "-j", "2", "demo") == steps
    assert all("N" in step.split("|")[0].split() for step in steps_of(house, "demo", "N=4"))


def test_the_demo_by_the_paper_takes_the_same_steps(house) -> None:
    by_paper = [step.split("|") for step in steps_of(house, "demo-paper", "N=4")]
    assert [words for words, *_ in by_paper] == [step.split("|")[0] for step in steps_of(house, "demo", "N=4")]
    assert {run for _, run, _ in by_paper} == {"runs/demo-paper"}


def test_the_raw_half_of_the_demo_keeps_typed_settings_beside_its_own(house) -> None:
    own = 'features.stage2.captions=[{column="alt_text"}] features.stage2.shards=["laion_*"]'
    said = "sampling.prompt=it's $5 off"
    for typed, settings in (([], own), ([f"SET={said}"], f"{own} {said}")):
        steps = [step.split("|") for step in steps_of(house, "demo-raw", *typed, exported={"SET": "not=typed"})]
        raw = [(words.split()[2], given) for words, run, given in steps if run == "runs/demo-raw"]
        assert raw == [(door, settings) for door in ("features", "train", "sample", "judge", "report")]


def test_the_demo_of_dreambooth_draws_before_it_learns(house) -> None:
    steps = [step.split("|") for step in steps_of(house, "demo-dreambooth")]
    doors = [(words.split()[2], run.removeprefix("runs/demo-dreambooth")) for words, run, _ in steps]
    before = [("sample", "/prior"), ("sample", "/prior"), ("caption", "/prior"), ("features", "/prior")]
    learns = [(door, "") for door in ("caption", "features", *["train", "sample"] * 2, "detect")]
    assert doors == [("subject", ""), *before, *learns]
    given = [settings for words, _, settings in steps if words.split()[2] == "sample"]
    assert given == ["sampling.checkpoint=toyworld/released/pixart"] * 2 + [""] * 2


def test_the_demo_of_another_vae_draws_before_it_and_with_each_checkpoint(house) -> None:
    steps = [step.split("|") for step in steps_of(house, "demo-vae", "SET=training.seed=1")]
    assert {run for _, run, _ in steps} == {"runs/demo-vae"}
    doors = ["world", "caption", "features", "features", "train", *["sample"] * 9, "judge", "report"]
    assert [words.split()[2] for words, _, _ in steps] == doors
    drawn = [settings for words, _, settings in steps if words.split()[2] == "sample"]
    places = [f"runs/demo-vae/training/vae/step-{step}" for step in range(50, 401, 50)]
    checkpoints = ["toyworld/released/pixart sampling.size=64x64", *places]
    assert drawn == [f"sampling.checkpoint={checkpoint} training.seed=1" for checkpoint in checkpoints]


def test_the_demo_of_control_draws_with_edges_and_without(house) -> None:
    steps = [step.split("|") for step in steps_of(house, "demo-control", "SET=training.seed=1")]
    doors = [(words.split()[2], run.removeprefix("runs/demo-control")) for words, run, _ in steps]
    learns = [(door, "") for door in ("edges", "caption", "features", "train", "sample")]
    assert doors == [*learns, ("sample", "/alone"), ("follow", "")]
    drawn = [settings for words, _, settings in steps if words.split()[2] == "sample"]
    assert drawn == ["training.seed=1", "sampling.checkpoint=toyworld/released/pixart training.seed=1"]


def test_the_demo_of_few_steps_draws_the_student_and_the_weights_it_began_from_alike(house) -> None:
    steps = [step.split("|") for step in steps_of(house, "demo-lcm", "SET=training.seed=1")]
    assert {run for _, run, _ in steps} == {"runs/demo-lcm"}
    doors = ["world", "caption", "features", "train", *["sample"] * 15, "judge", "report"]
    assert [words.split()[2] for words, _, _ in steps] == doors
    drawn = [settings for words, _, settings in steps if words.split()[2] == "sample"]
    assert all(settings.endswith(" training.seed=1") for settings in drawn)
    places = ("runs/demo-lcm/training/lcm", "toyworld/released/pixart")
    student, began = (f"sampling.checkpoint={place}" for place in places)
    assert [settings.split()[0] for settings in drawn] == [began, *[student, began] * 5, *[began, student] * 2]
    alike = [settings for settings in drawn[1:11] if settings.startswith(began)]
    assert all("sampling.solver=lcm sampling.guidance_scale=1" in settings for settings in alike)


def test_the_demo_of_curation_trains_and_draws_alike_on_all_on_the_chosen_and_on_the_sound(house) -> None:
    steps = [step.split("|") for step in steps_of(house, "demo-curation", "SET=training.seed=1")]
    assert {(run, settings) for _, run, settings in steps} == {("runs/demo-curation", "training.seed=1")}
    doors = [words.split()[2] for words, _, _ in steps]
    assert doors == ["spoil", "caption", "columns", *["features", "train", "sample"] * 3, "judge", "report"]


def wrong(*typed: str) -> str:
    return find_wrong(list(read_words(typed)), TARGETS) or ""


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("caption SHARDS=/d/sa_0.tar /d/sa_1.tar", "/d/sa_1.tar is no target. If it belongs to SHARDS=/d/sa_0.tar, "),
        ("caption SHARDS=/d/sa_0.tar /d/sa_1.tar", "type it in quotes, SHARDS='…'"),
        ("caption SHARDS=/d/sa_0.tar SHARDS=/d/sa_1.tar", "SHARDS is typed twice"),
        ("caption SET=a.b=1 SET=a.c=2", "SET is typed twice, and make would keep the last alone: put both into one"),
        ("caption SET=captioning.prompts.default=Describe this image", "this is no target. If it belongs to SET="),
        ("sample STAGE=2 PROMPT=a cat", "cat is no target (did you mean caption?). If it belongs to PROMPT=a, "),
        ("caption shards=x", "there is no variable shards (did you mean SHARDS?)"),
        ("train STAGES=2", "there is no variable STAGES (did you mean STAGE?)"),
        ("caption RUNS=x", "there is no variable RUNS (did you mean RUN?)"),
        ("train STAGE=2 FROM-SCRATCH=1", "there is no variable FROM-SCRATCH (did you mean FROM_SCRATCH?)"),
        (
            "train STAGE=2 CUDA_VISIBLE_DEVICES=0",
            "what commands are to find in their environment is typed in front of make",
        ),
        ("test FOO=1", "there is no variable FOO"),
        ("caption captioning.batch_size=3", "is a key of the recipe: type SET='captioning.batch_size=…'"),
        ("train STAGE 2", "STAGE is a variable: type STAGE=value"),
        ("capton", "there is no target capton (did you mean caption?)"),
        ("stats STAGE=2", "stats would ignore STAGE: it belongs to choose, features, buckets, train, sample, eval"),
        ("convert FROM=a TO=b PLAN=1", "convert would ignore PLAN"),
        ("SHARDS=x", "help would ignore SHARDS"),
        ("pack RECIPE=r.toml", "pack would ignore RECIPE"),
        ("caption RUN:=x", "RUN:= is not how values are given: type RUN='…'"),
        ("caption RUN+=x", "RUN+= is not how values are given"),
        ("demo RUN=x", "the demo has a RECIPE, a RUN and stages of its own: leave RUN= out"),
        ("demo-raw STAGE=2", "stages of its own: leave STAGE= out"),
        ("demo RECIPE=r.toml", "stages of its own: leave RECIPE= out"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(typed, message) -> None:
    assert message in wrong(*typed.split())


@pytest.mark.parametrize("name", [variable(flag) for flag in FLAGS])
def test_an_empty_value_is_refused_unless_it_switches_off(name) -> None:
    target = next(target for target in SUBCOMMANDS if name in variables_of(target))
    is_off = name == "SET" or FLAGS[name.lower().replace("_", "-")].is_switch
    expected = "" if is_off else f"{name} is empty: type a value, or leave {name}= out"
    assert wrong(target, f"{name}=") == wrong(target, f"{name}= ") == expected


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "-s -j 2 demo N=3",
        "-j demo",
        "-kj 4 caption",
        "-C elsewhere caption RUN=x",
        "-sC elsewhere -f Makefile -I a --directory b caption",
        "--jobs=3 --no-print-directory -l 2.5 features train sample STAGE=2 GPUS=1 PROMPT=a=b",
        "test PYTHON=python3.12",
        "RECIPE=r.toml verify RUN=x",
        "RECIPE=r.toml convert FROM=a TO=b",
    ],
)
def test_options_of_make_and_what_any_target_of_the_line_takes_are_let_through(typed) -> None:
    assert wrong(*typed.split()) == ""


def test_a_value_that_make_would_cut_is_refused() -> None:
    assert "RUN begins with a space, which make takes away" in wrong("caption", "RUN= my run")
    assert wrong("caption", "SET= a.b=1", "RUN=my run ") == ""


def test_help_names_every_variable() -> None:
    names = {variable(flag) for target in SUBCOMMANDS for flag in SUBCOMMANDS[target].flags}
    assert {name for name in names if f"{name}=" not in VARIABLES} == set()


def test_help_has_what_targets_do_in_one_column(capsys) -> None:
    show_help(REPOSITORY / "Makefile")
    lines = [line for line in capsys.readouterr().out.split("\n\n")[0].splitlines() if line]
    starts = [match.end() for line in lines if (match := re.match(r"  make \S+ +", line))]
    assert len(starts) == len(lines) > 30 and len(set(starts)) == 1


def test_summaries_of_commands_have_no_words_of_make_outside_brackets() -> None:
    told = {name: of.summary.partition(" (")[0] for name, of in SUBCOMMANDS.items()}
    assert {name: summary for name, summary in told.items() if re.search(r"[A-Z]{2,}=", summary)} == {}


def test_words_are_read_as_make_reads_them() -> None:
    assert list(read_words(["-C", "x=y", "a", "B=c d=e", "we ird=3", "F?=g"])) == [
        *(Word("a"), Word("B", "=", "c d=e"), Word("we ird=3"), Word("F", "?=", "g"))
    ]


def test_make_refuses_before_anything_starts(house) -> None:
    (house / "all").unlink(missing_ok=True)
    (house / "sa_1.tar").touch()  # which make would call up to date
    for typed in (["SHARDS=sa_0.tar", "sa_1.tar"], ["SHARDS=a", "SHARDS=b"], ["shards=a"], ["RUN="]):
        done = run_make(house, "caption", *typed)
        assert done.returncode == 2 and "***" in done.stderr
    assert not (house / "all").exists()

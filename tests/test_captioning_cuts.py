"""Passes that are cut of other captions by rule: whole sentences within bounds, in any script, without a model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import captioning.cuts.making as making
from captioning.config import CaptioningConfig
from captioning.cuts.cutting import CutRule, CutText, cut_text
from captioning.pass_jobs import read_pass_jobs
from errors import UserError
from pipelines.columns.sample_columns import SampleColumns
from pipelines.command import parse_command
from pipelines.engine.progress import console
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary
from tests.passes_run import command, contents, rows_of
from tests.raw_shards import encode, laion_members, photo, write_tar
from tests.sound_run import require_sound
from tests.tiny_models import save_llava

ENGLISH = "A red circle is on the left. Dr. Smith stands 3.5 metres away. It is raining! Is it late?"
CHINESE = "左边有一个红色的圆。右边站着一只狗。天在下雨！"
HINDI = "बाईं ओर एक लाल वृत्त है। दाईं ओर एक कुत्ता है।"
LIST = "Two things:\n- a dog.\n- a cat.\n\nThe end."
RECIPE = """
[data]
shards = "{run}/raw/*.tar"

[engine]
samples_per_slice = 2
in_process = true
gpus_per_worker = 1.0

[captioning]
engine = "given"
table = { caption = "#", other = "#second" }
max_reject_fraction = 1.0

[captioning.passes.first]
engine = "cut"
max_sentences = 1

[captioning.passes.few_words]
engine = "cut"
of = "other"
max_words = 5

[captioning.passes.tiny]
engine = "cut"
of = "medium"
max_sentences = 1

[captioning.passes.medium]
engine = "cut"
max_sentences = 2
"""


@pytest.mark.parametrize(
    ("text", "rule", "wanted"),
    [
        (ENGLISH, {"max_sentences": 2}, "A red circle is on the left. Dr. Smith stands 3.5 metres away."),
        (ENGLISH, {"max_words": 15}, "A red circle is on the left. Dr. Smith stands 3.5 metres away."),
        (ENGLISH, {"max_words": 12}, "A red circle is on the left."),
        (ENGLISH, {"max_words": 2}, "A red circle is on the left."),
        (ENGLISH, {"max_words": 100, "max_sentences": 3}, ENGLISH.removesuffix(" Is it late?")),
        (ENGLISH, {}, ENGLISH),
        (CHINESE, {"max_sentences": 1}, "左边有一个红色的圆。"),
        (CHINESE, {"max_words": 16}, "左边有一个红色的圆。右边站着一只狗。"),
        (CHINESE, {"max_words": 15}, "左边有一个红色的圆。"),
        (HINDI, {"max_sentences": 1}, "बाईं ओर एक लाल वृत्त है।"),
        (LIST, {"max_sentences": 2}, "Two things:\n- a dog."),
        ("no full stop at all", {"max_words": 2}, "no full stop at all"),
        ("", {"max_words": 2}, ""),
    ],
)
def test_the_longest_run_of_first_whole_sentences(text: str, rule: dict[str, Any], wanted: str) -> None:
    assert cut_text(text, CutRule(**rule)).text == wanted


def test_sentences_that_are_dropped_or_not_whole() -> None:
    rule = CutRule(max_sentences=2)
    cut = cut_text(ENGLISH, rule, dropped=[0])
    assert cut == CutText(
        text="Dr. Smith stands 3.5 metres away. It is raining!", num_sentences=2, num_before=4, ends_early=True
    )
    assert cut_text(ENGLISH, rule, dropped=[1, 2]).text == "A red circle is on the left. Is it late?"
    assert not cut_text(ENGLISH, rule, dropped=[1, 2]).ends_early
    nothing = CutText(text="", num_sentences=0, num_before=4, ends_early=False)
    assert cut_text(ENGLISH, rule, dropped=range(4)) == nothing
    unfinished = "A dog sits. It is a very"
    assert cut_text(unfinished, rule, is_unfinished=True).text == "A dog sits."
    # The only one there is stays, and where it ends as it did before.
    assert cut_text(unfinished, rule, dropped=[0], is_unfinished=True).text == "It is a very"
    assert not cut_text(unfinished, rule, dropped=[0], is_unfinished=True).ends_early


def write_run(run: Path) -> Path:
    """Write two shards of texts in several scripts, the second text of some, and a broken image in the first."""
    texts = [ENGLISH, CHINESE, HINDI, LIST, "One. Two. Three."]
    for shard in ("laion_00000", "laion_00001"):
        members: list[tuple[str, bytes]] = []
        for number, text in enumerate(texts):
            image = b"" if (shard, number) == ("laion_00000", 4) else encode(photo(number))
            members += laion_members(f"{number:05d}", image, text)
            if number != 1:
                members.append((f"{number:05d}.second.txt", f"Second {number}. Of four words. More.".encode()))
        write_tar(run / "raw" / f"{shard}.tar", members)
    (run / "recipe.toml").write_text(RECIPE)
    return run


PASSES = ("first", "few_words", "tiny", "medium")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("cuts") / "run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(run, monkeypatch=monkeypatch)
    require_sound(run)
    return run


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def texts_of(run: Path, column: str, shard: str = "laion_00001") -> list[str | None]:
    return [row["caption"] for row in rows_of(run, column, shard)]


def test_cuts_of_captions_of_other_columns_and_of_cuts(finished: Path) -> None:
    firsts = ["A red circle is on the left.", "左边有一个红色的圆。", "बाईं ओर एक लाल वृत्त है।", "Two things:", "One."]
    assert texts_of(finished, "first") == firsts == texts_of(finished, "tiny")
    assert texts_of(finished, "medium")[::2] == [ENGLISH[:62], HINDI, "One. Two."]
    # A sample without the other text has an empty caption here; its words are two and three, then one more.
    words = [f"Second {number}. Of four words." for number in (0, 2, 3, 4)]
    assert texts_of(finished, "few_words") == [words[0], "", *words[1:]]
    assert [row["flags"] for row in rows_of(finished, "few_words", "laion_00001")] == [[], ["empty"], [], [], []]


def test_rows_have_what_they_are_of_and_nothing_of_what_was_cut(finished: Path) -> None:
    before, after = (rows_of(finished, column, "laion_00000") for column in ("caption", "first"))
    same = ("key", "shard", "alt_text", "width", "height")
    assert [[row[name] for name in same] for row in before] == [[row[name] for name in same] for row in after]
    assert [row["reject"] for row in before] == [None] * 4 + ["empty_image"]
    assert [row["reject"] for row in after] == [None] * 4 + ["caption:empty_image"]
    for row in after[:4]:
        assert row["caption"] == row["caption_raw"] and row["finish_reason"] == "cut"
        assert [row[name] for name in ("prompt", "num_tokens", "first_caption", "clip_score")] == [None] * 4
    assert rows_of(finished, "medium", "laion_00000")[2]["finish_reason"] is None, "nothing was left out"


def test_counts_and_manifest(finished: Path) -> None:
    manifest = read_manifest(finished / "captions@tiny")
    assert (manifest.num_read, manifest.num_kept, manifest.rejected) == (10, 9, {"caption:empty_image": 1})
    assert {name: manifest.extra[name] for name in ("engine", "of", "max_sentences", "max_words", "supported")} == {
        "engine": "cut", "of": "medium", "max_sentences": 1, "max_words": None, "supported": False,
    }  # fmt: skip
    details = read_manifest(finished / "captions@first").shards["laion_00001"].details
    assert {name: details[name] for name in details if name.startswith("num_")} == {
        "num_sentences": 4 + 3 + 2 + 4 + 3, "num_sentences_kept": 5, "num_captions_cut": 5, "num_nothing_left": 0,
        "num_without_text": 0, "num_tokens": 0,
    }  # fmt: skip
    captions = read_manifest(finished / "captions").shards["laion_00000"]
    source = read_manifest(finished / "captions@first").shards["laion_00000"].source
    assert source == f"{captions.source}+captions:{captions.files['.parquet']}"
    assert read_summary(finished)["counts"]["captioning@few_words"]["kept"] == 9
    read = SampleColumns(finished).read("laion_00001", ["tiny", "tiny.flags.empty"])
    assert read["tiny"].to_pylist() == texts_of(finished, "tiny")


def test_what_is_done_costs_nothing_and_another_rule_cuts_what_hangs_on_it(run: Path, monkeypatch) -> None:
    before = {name: contents(run, name) for name in PASSES}
    with monkeypatch.context() as patch:
        patch.setattr(making, "CutWorker", None)
        command(run, monkeypatch=patch)
    assert {name: contents(run, name) for name in PASSES} == before
    times = {path: path.stat().st_mtime_ns for path in run.glob("captions*/*.parquet")}
    command(run, "captioning.passes.medium.max_sentences=3", monkeypatch=monkeypatch)
    changed = {path.parent.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {"captions@medium", "captions@tiny"}
    assert contents(run, "tiny") != before["tiny"], "its manifest knows what it is cut of"
    assert texts_of(run, "medium")[4] == "One. Two. Three."
    command(run, monkeypatch=monkeypatch)
    assert {name: contents(run, name) for name in PASSES} == before


def test_a_shard_that_is_captioned_anew_is_cut_anew_alone(run: Path, monkeypatch) -> None:
    times = {path: path.stat().st_mtime_ns for path in run.glob("captions*/*.parquet")}
    write_tar(run / "raw" / "laion_00001.tar", laion_members("x", encode(photo(1)), "New. Text."))
    command(run, monkeypatch=monkeypatch)
    assert {path.stem for path in times if path.stat().st_mtime_ns != times[path]} == {"laion_00001"}
    assert texts_of(run, "tiny") == ["New."]


def test_other_thresholds_judge_again_and_cut_nothing(run: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(making, "CutWorker", None)
        command(run, 'captioning.passes.first.quality.off_frame_phrases=["red circle"]', monkeypatch=patch)
    assert [row["flags"] for row in rows_of(run, "first", "laion_00001")][:2] == [["off_frame"], []]


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_stopped_cut_ends_with_the_same_bytes(tmp_path: Path, finished: Path, pieces: int, monkeypatch) -> None:
    run = write_run(tmp_path / "run")
    work, calls = making.CutWorker.__call__, []

    def stop(self: Any, piece: Any) -> Any:
        calls.append(piece)
        if len(calls) > pieces:
            raise KeyboardInterrupt
        return work(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(making.CutWorker, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            command(run, monkeypatch=patch)
    command(run, monkeypatch=monkeypatch)
    assert {name: contents(run, name) for name in PASSES} == {name: contents(finished, name) for name in PASSES}


def test_tokens_are_those_of_the_model_that_wrote_or_of_one_that_is_named(
    tmp_path: Path, finished, monkeypatch
) -> None:
    model = save_llava(tmp_path / "llava")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    run = shutil.copytree(finished, tmp_path / "run")
    count = len(tokenizer.encode(ENGLISH[:62], add_special_tokens=False).ids)
    for bound, wanted in ((count, ENGLISH[:62]), (count - 1, ENGLISH[:28])):
        rule = f"captioning.passes.t={{engine='cut',max_tokens={bound},tokenizer='{model}'}}"
        command(run, rule, "captioning.only=t", monkeypatch=monkeypatch)
        row = rows_of(run, "t", "laion_00001")[0]
        assert row["caption"] == wanted
        assert row["num_tokens"] == len(tokenizer.encode(wanted, add_special_tokens=False).ids) <= bound
    # Of the captions' own model where it has one, without being named.
    argv = ["--recipe", str(run / "recipe.toml"), "--run", str(run)]
    own = ["captioning.engine=transformers", f"captioning.model={model}", "captioning.table=", "captioning.passes={}"]
    own += ["captioning.passes.t={engine='cut',max_tokens=3}"]
    jobs = read_pass_jobs(
        parse_command("captioning", "", argv=argv + [word for text in own for word in ("--set", text)])
    )
    assert jobs.cuts[0].tokenizer == jobs.captions[0].model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["captioning.passes.first.of=tiny", "captioning.passes.medium.of=first"],
            "goes in a circle: .*tiny is cut of",
        ),
        (
            ["captioning.passes.first.of=first"],
            "captioning.passes.first.of = 'first' goes in a circle: first is cut of",
        ),
        (
            ["captioning.passes.first.of=othr"],
            "captioning.passes.first.of = 'othr' names no captions.*did you mean other",
        ),
        (["captioning.passes.x={engine='cut'}"], "captioning.passes.x: it cuts nothing"),
        (["captioning.passes.first.model=x"], "captioning.passes.first.model"),
        (["captioning.passes.first.max_sentences=0"], "captioning.passes.first.max_sentences"),
        (["captioning.passes.first.max_tokens=9"], "first.max_tokens = 9: 'caption' is written by no model.*max_words"),
        (
            ["captioning.passes.few_words.supported=true"],
            r"claims of 'other', which captioning.claims.of = \['caption'\]",
        ),
        (["captioning.passes.first.tokenizer=./no"], "model folder ./no does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_captioned(
    run: Path, settings: list[str], message: str, monkeypatch
) -> None:
    shutil.rmtree(run / "captions")
    with pytest.raises((UserError, FileNotFoundError), match=message):
        command(run, *settings, monkeypatch=monkeypatch)
    assert not (run / "captions").exists()


def test_the_plan_says_what_is_cut_of_what(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "width", 400)
    command(run, "captioning.passes.medium.max_words=9", is_plan=True, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    rule = "cut of caption, without a model: max_sentences 2, max_words 9; 10 of 10 samples to do"
    assert f"captions@medium: {rule}" in said
    assert "captions@first: cut of caption, without a model: max_sentences 1; 0 of 10 samples to do" in said
    shutil.rmtree(run / "captions")
    command(run, is_plan=True, monkeypatch=monkeypatch)
    assert "captions@first: cut of caption, without a model: max_sentences 1; waits:" in capsys.readouterr().err


def test_a_cut_alone_needs_its_captions(tmp_path: Path, monkeypatch) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"captioning.passes.first.of: .*captions has no manifest.*caption RUN=|--run"):
        command(run, "captioning.only=first", monkeypatch=monkeypatch)


def test_the_engine_of_the_captions_themselves_is_no_cut() -> None:
    with pytest.raises(ValueError, match="engine"):
        CaptioningConfig(engine="cut")

"""`captioning.passes`: more captions of each image in one command, as columns with their own prompts and resume."""

import hashlib
import re
import shutil
import time
from pathlib import Path

import pytest

import captioning.__main__ as captioning_main
from captioning.config import DEFAULT_PROMPTS, CaptioningConfig
from captioning.job import workers_of
from captioning.passes import lay_over
from errors import UserError
from pipelines.columns.caption_columns import RunCaptions
from pipelines.columns.sample_columns import SampleColumns
from pipelines.engine.pieces import Source
from pipelines.engine.progress import console
from pipelines.engine.run import EngineConfig
from pipelines.recipe import Recipe
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary
from tests.passes_run import command, contents, rows_of, write_run
from tests.raw_shards import UNICODE_ALT_TEXTS
from tests.sound_run import require_sound
from tests.tiny_models import save_llava
from tests.warm_python import WarmProcess

COLUMNS = ("caption", "short", "given")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    run = write_run(tmp_path_factory.mktemp("finished") / "run", model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(run, monkeypatch=monkeypatch)
    require_sound(run)
    return run


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_each_pass_asks_its_own_prompts_and_says_so(finished: Path) -> None:
    asked = {
        (column, shard): {row["prompt"] for row in rows_of(finished, column, shard)}
        for column in ("caption", "short")
        for shard in ("laion_00000", "sa_000000")
    }
    assert asked["caption", "sa_000000"] == {"What does this large photo show?"}
    assert len(asked["caption", "laion_00000"]) > 5, "the text of each image is in its prompt"
    # A pass that writes prompts asks nothing else, also where an image has a text or a pattern fits its shard.
    assert asked["short", "laion_00000"] == asked["short", "sa_000000"] == {"What is this?"}
    assert max(row["num_tokens"] for row in rows_of(finished, "short", "sa_000000")) == 6
    extras = {column: read_manifest(finished / folder_of(column)).extra for column in COLUMNS}
    prompts = {"default": "What is this?", "img2dataset": "What is this?"}
    lines = "\0".join(f"{name}\0{prompts[name]}" for name in sorted(prompts))
    assert extras["short"]["prompts"] == prompts
    assert extras["short"]["prompts_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert extras["caption"]["prompts_sha256"] != extras["short"]["prompts_sha256"]
    assert extras["given"]["engine"] == "given" and "prompts" not in extras["given"]


def folder_of(column: str) -> str:
    return "captions" if column == "caption" else f"captions@{column}"


def test_a_given_pass_has_the_texts_of_its_own_shards(finished: Path) -> None:
    texts = [row["caption"] for row in rows_of(finished, "given", "laion_00000")]
    assert texts == [UNICODE_ALT_TEXTS[number % 8].strip() for number in range(12)]
    assert list(read_manifest(finished / "captions@given").shards) == ["laion_00000"]
    captions, raw = RunCaptions(finished), Source(name="sa_000000", path="", identity="", num_samples=10)
    with pytest.raises(UserError, match=r"\(sa_000000\).*where captioning.passes.given.shards leaves them out"):
        captions.require_shards(captions.find("given", key="features.stage2.captions"), [raw])


def test_passes_are_counted_and_read_by_name(finished: Path) -> None:
    summary = read_summary(finished)
    assert summary["counts"] == {
        "captioning": {"read": 22, "kept": 22, "rejected": {}},
        "captioning@short": {"read": 22, "kept": 22, "rejected": {}},
        "captioning@given": {"read": 12, "kept": 12, "rejected": {}},
    }
    table = SampleColumns(finished).read("laion_00000", ["caption", "short", "short.num_tokens", "given"])
    assert table["short"].to_pylist() == [row["caption"] for row in rows_of(finished, "short", "laion_00000")]
    assert table["caption"].to_pylist() == [row["caption"] for row in rows_of(finished, "caption", "laion_00000")]


def test_the_captions_are_those_of_a_run_without_passes(
    tmp_path: Path, model: Path, finished: Path, monkeypatch
) -> None:
    run = write_run(tmp_path / "run", model)
    command(run, "captioning.passes={}", monkeypatch=monkeypatch)
    assert contents(run, "caption") == contents(finished, "caption")
    assert sorted(path.name for path in run.glob("captions*")) == ["captions"]


def test_what_is_done_loads_no_model_and_another_pass_makes_itself_alone(
    run: Path, finished: Path, monkeypatch
) -> None:
    before = {column: contents(run, column) for column in COLUMNS}
    with monkeypatch.context() as patch:
        patch.setattr("captioning.engines.transformers_engine.TransformersEngine", None)
        command(run, monkeypatch=patch)
    assert {column: contents(run, column) for column in COLUMNS} == before
    times = {path: path.stat().st_mtime_ns for path in (run / "captions").glob("*.parquet")}
    command(run, "captioning.passes.short.max_new_tokens=5", monkeypatch=monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert max(row["num_tokens"] for row in rows_of(run, "short", "sa_000000")) == 5
    assert contents(run, "given") == before["given"]
    command(run, "captioning.passes.short.max_new_tokens=6", monkeypatch=monkeypatch)
    assert contents(run, "short") == contents(finished, "short")


def test_passes_are_judged_and_retried_as_captions_are(run: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("captioning.engines.transformers_engine.TransformersEngine", None)
        command(run, "captioning.passes.short.quality.min_alt_text_overlap=1.0", monkeypatch=patch)
    flagged = {
        column: ["off_alt_text" in row["flags"] for row in rows_of(run, column, "laion_00000")] for column in COLUMNS
    }
    assert any(flagged["short"]) and not any(flagged["caption"]) and not any(flagged["given"])
    with pytest.raises(UserError, match=r"captioning.retry_rejects .*captions@short: max_new_tokens is 6, but 5"):
        changed = ("captioning.retry_rejects=true", "captioning.passes.short.max_new_tokens=5")
        command(run, *changed, monkeypatch=monkeypatch)


def test_some_passes_alone(tmp_path: Path, model: Path, finished: Path, monkeypatch, capsys) -> None:
    run = write_run(tmp_path / "run", model)
    command(run, "captioning.only=short, given", monkeypatch=monkeypatch)
    assert sorted(path.name for path in run.glob("captions*")) == ["captions@given", "captions@short"]
    assert contents(run, "short") == contents(finished, "short")
    with pytest.raises(UserError, match=r"captioning.only .* names 'shrot'.*caption, short, given .did you mean short"):
        command(run, "captioning.only=shrot", monkeypatch=monkeypatch)
    monkeypatch.setattr(console, "width", 400)
    command(run, is_plan=True, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    # The title of a table is broken at its width.
    parts = said.split("Captions of ")[1:]
    for column, part in zip(COLUMNS, parts, strict=True):
        assert f"into{run / folder_of(column)}┏" in "".join(part.split())
        assert bool(re.search(r"10\W+10\W+0\.0 MB", part)) == (column == "caption"), "what is done is not to be done"


def test_a_run_stopped_in_a_pass_goes_on_there(tmp_path: Path, model: Path, finished: Path, monkeypatch) -> None:
    """Stopped inside of the first pass after the captions; the rest is made with the bytes of an undisturbed run."""
    run = write_run(tmp_path / "run", model)
    work = captioning_main.run_over_shards

    def stop(*args, room: str, **keys):
        if room == "captioning short":
            raise KeyboardInterrupt
        return work(*args, room=room, **keys)

    with monkeypatch.context() as patch:
        patch.setattr("captioning.__main__.run_over_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            command(run, monkeypatch=patch)
    assert sorted(path.parent.name for path in run.glob("captions*/*.parquet")) == ["captions", "captions"]
    command(run, monkeypatch=monkeypatch)
    assert {column: contents(run, column) for column in COLUMNS} == {
        column: contents(finished, column) for column in COLUMNS
    }


def test_kill_9_inside_of_a_pass(tmp_path: Path, model: Path, finished: Path, monkeypatch) -> None:
    run = write_run(tmp_path / "run", model)
    words = ["--recipe", str(run / "recipe.toml"), "--run", str(run)]
    process = WarmProcess("captioning", words)
    parts = run / "captions@short"
    while process.poll() is None and not list(parts.glob(".parts/*/*")) and not list(parts.glob(".done/*")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (run / "captions@given").exists()
    done = {path: path.stat().st_mtime_ns for path in (run / "captions").glob("*.parquet")}
    command(run, monkeypatch=monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "the captions were whole"
    assert {column: contents(run, column) for column in COLUMNS} == {
        column: contents(finished, column) for column in COLUMNS
    }
    require_sound(run)


def test_what_belongs_to_a_changed_key_is_not_taken_over() -> None:
    whole = {
        "model": "a", "revision": "123", "seed": 3,  "engine": "openai",
        "server": {"base_url": "http://a/v1", "num_requests": 3}, "prompts": {"sa_*": "What?", "default": "Who?"},
    }  # fmt: skip
    laid = lay_over(whole, {"model": "b", "server": {"num_requests": 5}})
    assert laid == {
        "model": "b", "seed": 3, "engine": "openai", "prompts": whole["prompts"],
        "server": {"base_url": "http://a/v1", "num_requests": 5},
    }  # fmt: skip
    assert lay_over(whole, {"prompts": {"default": "Short?"}})["prompts"] == {
        "default": "Short?",
        "img2dataset": "Short?",
    }
    assert lay_over(whole, {"prompts": {"hq_*": "Short?"}})["prompts"] == {**whole["prompts"], "hq_*": "Short?"}
    assert lay_over({"engine": "given", "table": "a.csv"}, {"engine": "generate"}) == {"engine": "generate"}
    assert CaptioningConfig(prompts=lay_over({}, {"max_new_tokens": 3}).get("prompts", {})).prompts == DEFAULT_PROMPTS


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("captioning.passes.Short.seed=1", "pass 'Short': use small letters"),
        ("captioning.passes.caption.seed=1", "pass 'caption': other columns of the samples are called so"),
        ("captioning.passes.flags.seed=1", "pass 'flags': other columns"),
        ("captioning.passes.not.seed=1", "pass 'not' is a word of expressions"),
        ("captioning.passes.pixels.seed=1", "pass 'pixels': other columns"),
        ("captioning.passes.duplicate_of.seed=1", "pass 'duplicate_of': other columns"),
        ("captioning.passes.short.only=1", "pass 'short': 'only' is one for all passes"),
        (
            "captioning.passes.short.modle=x",
            r"captioning.passes.short.modle is not a known key .did you mean captioning.passes.short.model",
        ),
        (
            "captioning.passes.short.engine=cuts",
            r"captioning.passes.short.engine = 'cuts' is no engine .did you mean cut",
        ),
        ("captioning.passes.short.temperature=3", "captioning.passes.short.temperature"),
        ("captioning.passes.short.prompts={default='{alt_text}'}", "captioning.passes.short.prompts"),
        ("captioning.passes.short.shards=['x_*']", r"captioning.passes.short.shards: pattern 'x_\*' matches none"),
        ("captioning.passes.given.table={caption='#',b='#'}", "captioning.passes.given is given, and is one column"),
        ("captioning.passes.short.model=./no", "captioning.passes.short.model|model folder ./no does not exist"),
        ("captioning.passes.short=3", "captioning.passes.short"),
    ],
)
def test_what_is_wrong_with_a_pass_is_said_by_its_key(finished: Path, setting: str, message: str, monkeypatch) -> None:
    with pytest.raises((UserError, FileNotFoundError), match=message):
        command(finished, setting, is_plan=True, monkeypatch=monkeypatch)


def test_a_pass_has_the_gpus_that_its_own_engine_needs(model: Path) -> None:
    """A server may make one pass and a model on a GPU the others, in one command."""
    of_recipe = EngineConfig(gpus_per_worker=1.0)
    gpus = {
        (engine, column): workers_of(
            CaptioningConfig.model_validate({"engine": engine, "vllm": {"tensor_parallel_size": 4}}),
            of_recipe,
            is_other=column != "caption",
        ).gpus_per_worker
        for engine in ("transformers", "openai", "vllm", "given")
        for column in ("caption", "short")
    }
    # Of the captions themselves it is what the recipe says, and what does not fit is refused.
    assert gpus == {
        ("transformers", "caption"): 1.0,
        ("transformers", "short"): 1.0,
        ("openai", "caption"): 1.0,
        ("openai", "short"): 0.0,
        ("vllm", "caption"): 1.0,
        ("vllm", "short"): 4.0,
        ("given", "caption"): 0.0,
        ("given", "short"): 0.0,
    }


def test_a_pass_of_a_server_beside_captions_of_a_gpu(finished: Path, monkeypatch, capsys) -> None:
    settings = ("engine.gpus_per_worker=1.0", 'captioning.passes.qwen.engine="openai"', "captioning.only=qwen")
    address = "captioning.passes.qwen.server.base_url=http://127.0.0.1:9/v1"
    with pytest.raises(UserError, match=re.escape("http://127.0.0.1:9/v1")):
        command(finished, *settings, address, is_plan=True, monkeypatch=monkeypatch)


def test_what_is_wrong_is_not_hidden_behind_all_passes(finished: Path, monkeypatch) -> None:
    others = [f"captioning.passes.short{number}.max_new_tokens={number}" for number in range(1, 9)]
    with pytest.raises(UserError) as wrong:
        command(finished, *others, "captioning.passes.flags.seed=1", is_plan=True, monkeypatch=monkeypatch)
    assert "captioning.passes: pass 'flags': other columns" in str(wrong.value) and "short8" not in str(wrong.value)


def test_a_pass_and_a_column_of_given_captions_cannot_share_a_name(tmp_path: Path) -> None:
    table = {"engine": "given", "table": {"caption": "#", "short": "#txt"}, "passes": {"short": {}}}
    with pytest.raises(UserError, match="'short' is a column of `table` and a pass"):
        Recipe(tmp_path / "r.toml", {"captioning": table}).table("captioning", CaptioningConfig)

"""`make claims`: what captions claim, asked back of the model or server, as columns that resume and are marked anew."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioning.__main__ import main as caption
from captioning.claims.__main__ import main
from captioning.claims.job import read_jobs
from captioning.claims.loading import load_asker
from captioning.claims.table import COLUMNS, SCHEMA
from captioning.claims.worker import ClaimWorker
from captioning.config import CaptioningConfig
from errors import MissingFileError, UserError
from pipelines.columns.known_scores import KNOWN_SCORES
from pipelines.columns.sample_columns import SampleColumns
from pipelines.command import parse_command
from pipelines.engine.pieces import Piece
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary
from tests.chat_server import Answer, ScriptedServer, prompt_of, say
from tests.planted_falsehoods import Planted, ask_back, auroc, likelihoods, plant
from tests.raw_shards import encode, laion_members, write_tar

TOY = "toyworld/weights/llava"
SHARDS = ("laion_00000", "laion_00001")
RECIPE = f"""
[data]
shards = "{{run}}/raw/*.tar"

[engine]
samples_per_slice = 3
in_process = true

[captioning]
engine = "given"
max_reject_fraction = 1.0

[captioning.claims]
engine = "transformers"
model = "{TOY}"
"""


def write_run(run: Path) -> list[Planted]:
    """Write two shards of toy pictures, whose texts hold a false object each, and caption them with these texts.

    In the first shard the second text has no words, and the third image broken.
    """
    planted = plant(10, "false_object", seed=3)
    for number, shard in enumerate(SHARDS):
        members: list[tuple[str, bytes]] = []
        for place, each in enumerate(planted[5 * number : 5 * number + 5]):
            image = encode(each.image, "PNG")
            text = "… ..." if (number, place) == (0, 1) else each.caption
            image = image[:60] if (number, place) == (0, 2) else image
            members += laion_members(f"{number:05d}{place:04d}", image, text, extension="png")
        write_tar(run / "raw" / f"{shard}.tar", members)
    (run / "recipe.toml").write_text(RECIPE)
    return planted


def command(run: Path, *settings: str, monkeypatch: pytest.MonkeyPatch, do: Any = main, is_plan: bool = False) -> None:
    argv = ["claims", "--recipe", str(run / "recipe.toml"), "--run", str(run)]
    for setting in settings:
        argv += ["--set", setting]
    monkeypatch.setattr("sys.argv", argv + (["--plan"] if is_plan else []))
    do()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with captions and their claims."""
    run = tmp_path_factory.mktemp("claims") / "run"
    write_run(run)
    with pytest.MonkeyPatch.context() as patch:
        command(run, monkeypatch=patch, do=caption)
        command(run, monkeypatch=patch)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def contents(run: Path, score: str = "claims") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "columns" / score).glob("*.parquet"))}


def rows_of(run: Path, shard: str, score: str = "claims") -> list[dict[str, Any]]:
    return pq.read_table(run / "columns" / score / f"{shard}.parquet").to_pylist()


def forbid_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be asked")

    monkeypatch.setattr("captioning.claims.worker.load_asker", asked)


def test_each_sample_has_a_row_and_false_sentences_are_marked(made: Path) -> None:
    first, second = (rows_of(made, shard) for shard in SHARDS)
    assert pq.read_schema(made / "columns/claims/laion_00000.parquet").names == SCHEMA.names
    assert [row["key"] for row in first] == [f"00000{place:04d}" for place in range(5)]
    empty, broken = first[1], first[2]
    assert (empty["num_claims"], empty["unsupported_share"], empty["min_support"]) == (0, None, None)
    assert (empty["unsupported_sentences"], empty["reject"]) == ([], None)
    assert broken["reject"] is not None and all(broken[name] is None for name in COLUMNS)
    planted = plant(10, "false_object", seed=3)
    sound = [(row, each) for row, each in zip([*first, *second], planted, strict=True) if row["num_claims"]]
    assert len(sound) == 8
    for row, each in sound:
        assert each.false <= set(row["unsupported_sentences"])
        assert row["num_claims"] == len(row["claim_supports"]) == len(row["claim_sentences"])
        num_unsupported = sum(support < 0.5 for support in row["claim_supports"])
        assert row["unsupported_share"] == pytest.approx(num_unsupported / row["num_claims"])
        assert row["min_support"] == min(row["claim_supports"]) < 0.5


def test_manifest_and_summary_tell_of_the_score_and_its_counts(made: Path) -> None:
    manifest = read_manifest(made / "columns" / "claims")
    score = manifest.extra["score"]
    assert (score["name"], set(score["columns"])) == ("claims", set(KNOWN_SCORES["claims"]))
    assert all(column.keys() == {"type", "unit", "meaning"} for column in score["columns"].values())
    assert (manifest.num_read, manifest.num_kept, sum(manifest.rejected.values())) == (10, 9, 1)
    found = read_summary(made)["claims"]["caption"]
    rows = [row for shard in SHARDS for row in rows_of(made, shard) if row["reject"] is None]
    assert found["claims"] == sum(row["num_claims"] for row in rows)
    assert found["unsupported"] == sum(s < 0.5 for row in rows for s in row["claim_supports"]) >= 8
    assert (found["captions"], found["captions_without_claims"], found["unknown"]) == (9, 1, 0)
    table = SampleColumns(made).read("laion_00001", ["unsupported_share", "claims.min_support"])
    assert table["unsupported_share"].null_count == 0 and len(table) == 5


def test_a_second_time_nothing_is_done_and_another_threshold_asks_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)
    forbid_asking(monkeypatch)
    command(run, monkeypatch=monkeypatch)
    assert contents(run) == before
    command(run, "captioning.claims.threshold=0", monkeypatch=monkeypatch)
    assert all(not row["unsupported_sentences"] for row in rows_of(run, "laion_00001"))
    assert all(row["unsupported_share"] == 0 for row in rows_of(run, "laion_00001"))
    command(run, "captioning.claims.threshold=0.5", monkeypatch=monkeypatch)
    assert contents(run) == before


def test_new_captions_are_asked_about_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [
        member
        for place, each in enumerate(plant(5, "false_object", seed=4))
        for member in laion_members(f"00001{place:04d}", encode(each.image, "PNG"), each.caption, extension="png")
    ]
    write_tar(run / "raw" / "laion_00001.tar", members)
    with pytest.raises(UserError, match=r"source .*type `.*caption.*` again"):
        command(run, monkeypatch=monkeypatch)
    command(run, monkeypatch=monkeypatch, do=caption)
    before, asked = contents(run), []
    call = ClaimWorker.__call__

    def noting(self: ClaimWorker, piece: Piece) -> Any:
        asked.append(piece.source.name)
        return call(self, piece)

    monkeypatch.setattr(ClaimWorker, "__call__", noting)
    command(run, monkeypatch=monkeypatch)
    after = contents(run)
    assert set(asked) == {"laion_00001"}
    assert after["laion_00000.parquet"] == before["laion_00000.parquet"]
    assert after["laion_00001.parquet"] != before["laion_00001.parquet"]


def test_bytes_are_the_same_however_a_shard_is_cut_and_after_a_kill(
    run: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "columns")
    monkeypatch.setattr("sys.argv", ["claims", "--recipe", str(run / "recipe.toml"), "--run", str(run)])
    (job,) = read_jobs(parse_command("claims", "", is_silent=True))
    worker, source = ClaimWorker(job.worker_config), job.sources[1]
    parts = []
    for start, stop in ((0, 3), (3, 5)):
        folder = tmp_path / f"parts-{start}"
        folder.mkdir()
        piece = Piece(source=source, start=start, stop=stop, folder=folder, samples_per_slice=3)
        assert worker(piece).num_kept == stop - start
        parts.append({".parquet": piece.output(".parquet")})
    ClaimWorker.join(parts, {".parquet": tmp_path / "joined.parquet"})
    assert (tmp_path / "joined.parquet").read_bytes() == contents(made)["laion_00001.parquet"]

    ask = ClaimWorker._ask

    def dying(self: ClaimWorker, loader: Any, samples: Sequence[Any]) -> Any:
        if samples[0].key == "000010000":
            raise KeyboardInterrupt
        return ask(self, loader, samples)

    monkeypatch.setattr(ClaimWorker, "_ask", dying)
    with pytest.raises(KeyboardInterrupt):
        command(run, monkeypatch=monkeypatch)
    monkeypatch.setattr(ClaimWorker, "_ask", ask)
    command(run, monkeypatch=monkeypatch)
    assert contents(run) == contents(made)


def test_claims_do_not_depend_on_what_is_asked_beside_them_nor_on_the_engine() -> None:
    planted = plant(3, "wrong_colour", seed=5)
    config = CaptioningConfig.model_validate({"model": TOY, "batch_size": 4})
    together = ask_back(config, planted)
    generated = ask_back(config.model_copy(update={"engine": "generate"}), planted)
    assert [support for each in generated for support in each] == pytest.approx(
        [support for each in together for support in each], abs=2e-4
    )
    asker = load_asker(config, api_key="", num_threads=1)
    questions = ["Is this a circle?", "Is the following true? A red star on the left, in the upper part."]
    both = asker.supports([asker.prepare(planted[0].image, questions)])
    alone = asker.supports([asker.prepare(planted[0].image, [question]) for question in questions])
    assert both[0] == pytest.approx([support for (support,) in alone], abs=2e-4)


def test_a_question_longer_than_the_models_context_is_unknown() -> None:
    for engine in ("transformers", "generate"):
        config = CaptioningConfig.model_validate({"model": TOY, "engine": engine, "max_new_tokens": 1})
        asker = load_asker(config, api_key="", num_threads=1)
        image = plant(1, "wrong_colour", seed=6)[0].image
        ((long, short),) = asker.supports([asker.prepare(image, ["Is it? " * 400, "Is it a circle?"])])
        assert long is None and short is not None


def test_a_vocabulary_without_an_answer_is_said() -> None:
    config = CaptioningConfig.model_validate({"model": TOY, "claims": {"yes": ["no way"]}})
    with pytest.raises(UserError, match=r"captioning\.claims\.yes = \['no way'\].*no token of .* begins"):
        load_asker(config, api_key="", num_threads=1)


# Servers


def with_logprobs(tokens: dict[str, float]) -> Answer:
    status, body = say(next(iter(tokens)))
    top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in tokens.items()]
    body["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return status, body


def ask_server(run: Path, answer: Any, *, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    with ScriptedServer(answer) as server:
        settings = ("engine=openai", "model=toy")
        command(
            run,
            *(f"captioning.claims.{setting}" for setting in settings),
            f"captioning.server.base_url={server.base_url}",
            "engine.gpus_per_worker=1.0",  # of the captioner: who asks a server has none
            monkeypatch=monkeypatch,
        )
        return server.requests


def test_a_server_is_asked_for_likelihoods_and_answers_of_neither_kind_are_unknown(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        claim = prompt_of(body)
        if "background" in claim:
            return with_logprobs({"Well": 0.99, "Yes": 0.01})
        return with_logprobs({"No": 0.6, " yes": 0.3, "YES": 0.1} if "There is" in claim else {"Yes": 0.9, "no": 0.1})

    requests = ask_server(run, answer, monkeypatch=monkeypatch)
    assert all((body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1) for body in requests)
    rows = [row for row in rows_of(run, "laion_00001") if row["reject"] is None]
    assert all(row["num_unknown"] == row["claim_supports"].count(None) == 1 for row in rows)
    assert {round(s, 4) for row in rows for s in row["claim_supports"] if s is not None} == {0.4, 0.9}
    assert all(row["unsupported_share"] == pytest.approx(1 / (row["num_claims"] - 1)) for row in rows)
    details = read_manifest(run / "columns" / "claims").shards["laion_00001"].details
    assert details["num_unknown_claims"] == len(rows) == read_summary(run)["claims"]["caption"]["unknown"] - 3


def test_a_server_without_likelihoods_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"captioning\.server\.base_url .* without the likelihoods of its tokens"):
        ask_server(run, lambda body, number: say("Yes"), monkeypatch=monkeypatch)
    refused = (400, {"error": {"message": "top_logprobs is at most 5", "type": "error", "code": 400}})
    with pytest.raises(UserError, match=r"has not answered any of the first .* top_logprobs is at most 5"):
        ask_server(run, lambda body, number: refused, monkeypatch=monkeypatch)


# What is wrong with recipes and runs


def test_captions_that_are_missing_are_named_with_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(run / "raw/laion_00001.tar", run / "raw/laion_00002.tar")
    with pytest.raises(UserError, match=r"1 of 3 shards have no captions \(laion_00002\); type `.*caption.*` with"):
        command(run, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=r"captioning\.claims\.of names 'alt_txt'.*did you mean alt_text"):
        command(run, 'captioning.claims.of=["alt_txt"]', monkeypatch=monkeypatch)
    shutil.rmtree(run / "captions")
    with pytest.raises(MissingFileError, match=r"captions has no manifest.*type `.*caption.*` first"):
        command(run, monkeypatch=monkeypatch)


def test_other_columns_of_captions_have_folders_of_their_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)
    command(run, 'captioning.claims.of=["caption", "alt_text"]', monkeypatch=monkeypatch)
    assert contents(run) == before
    assert read_manifest(run / "columns" / "claims@alt_text").extra["of"] == "alt_text"
    first, second = (rows_of(run, "laion_00001", score) for score in ("claims", "claims@alt_text"))
    assert first == second  # captions were given, as these texts


def test_captions_that_were_cut_of_others_are_asked_about(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = ("captioning.passes.short={engine='cut',max_sentences=1}", 'captioning.claims.of=["short"]')
    command(run, *of, monkeypatch=monkeypatch, do=caption)
    command(run, *of, monkeypatch=monkeypatch)
    for row, whole in zip(rows_of(run, "laion_00001", "claims@short"), rows_of(run, "laion_00001"), strict=True):
        first = [number for number in whole["claim_sentences"] if number == 0]
        assert row["claim_sentences"] == first and row["claim_supports"] == whole["claim_supports"][: len(first)]
    # Nobody is asked about cuts of captions that have changed since.
    command(
        run,
        *of,
        'captioning.quality.off_frame_phrases=["circle"]',
        "captioning.only=caption",
        monkeypatch=monkeypatch,
        do=caption,
    )
    with pytest.raises(UserError, match=r"captions@short/laion_00000.parquet was cut of other captions than are in"):
        command(run, *of, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('captioning.claims.question="Is it true?"', r"captioning\.claims\.question.*holds \{claim\}"),
        ('captioning.claims.yes=["no"]', "'no' is among the words of yes and of no"),
        ("captioning.claims.threshold=2", r"captioning\.claims\.threshold"),
        ("captioning.claims.model=toyworld/weights/vae", r"captioning\.claims\.model"),
        ('captioning.claims.of=["caption", "caption"]', "names a column twice"),
    ],
)
def test_wrong_settings_are_named(run: Path, setting: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=message):
        command(run, setting, monkeypatch=monkeypatch)


def test_given_captions_need_somebody_to_ask(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "recipe.toml").write_text(RECIPE.partition("[captioning.claims]")[0])
    with pytest.raises(UserError, match=r"set captioning\.claims\.engine and captioning\.claims\.model"):
        command(run, monkeypatch=monkeypatch)


def test_a_plan_says_how_many_claims_there_are_and_who_is_asked(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    command(run, "captioning.claims.split=sentences", monkeypatch=monkeypatch, is_plan=True)
    said = "".join(capsys.readouterr())
    assert all(words in said for words in (TOY, "Is the following true of the image?", "sentences; unsupported below"))
    assert "would be asked again: split: clauses -> sentences" in said
    assert contents(run) == before


# Whether it finds what is false


@pytest.mark.parametrize(("kind", "bar"), [("false_object", 0.95), ("wrong_shape", 0.95), ("other_phrases", 0.95)])
def test_asking_back_tells_false_sentences_from_true_ones(kind: str, bar: float) -> None:
    planted = plant(60, kind, seed=31)
    assert auroc(planted, ask_back(CaptioningConfig(model=TOY), planted)) >= bar
    # The baseline, which knows the captioner's own phrases: it is no worse than chance, and needs the same model.
    assert auroc(planted, likelihoods(TOY, planted)) > 0.5

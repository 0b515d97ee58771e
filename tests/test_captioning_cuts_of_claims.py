"""Cuts by claims: a pass without the sentences that claims mark as unsupported, beside the whole captions."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from captioning.__main__ import main as caption
from captioning.claims.__main__ import main as claims
from errors import UserError
from pipelines.store.manifest import read_manifest
from pipelines.text.sentences import keep_sentences, split_sentences
from tests.passes_run import rows_of
from tests.sound_run import require_sound
from tests.test_captioning_claims import SHARDS, command, write_run

PASSES = (
    "captioning.passes.sound={engine='cut',supported=true}",
    "captioning.passes.short={engine='cut',of='sound',max_sentences=1}",
)


@pytest.fixture(scope="module")
def claimed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with captions, claims, and the passes that are cut by them; before its claims it had none of these."""
    run = tmp_path_factory.mktemp("claims") / "run"
    write_run(run)
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(run, *PASSES, monkeypatch=monkeypatch, do=caption)
        assert not list(run.glob("captions@*/*.parquet"))
        command(run, *PASSES, monkeypatch=monkeypatch, do=claims)
        command(run, *PASSES, monkeypatch=monkeypatch, do=caption)
    require_sound(run)
    return run


@pytest.fixture
def run(tmp_path: Path, claimed: Path) -> Path:
    return shutil.copytree(claimed, tmp_path / "run")


def test_marked_sentences_are_left_out_and_the_caption_is_as_it_was(claimed: Path) -> None:
    num_dropped = 0
    for shard in SHARDS:
        marked = read_claims(claimed, shard)
        captions, cuts = (rows_of(claimed, column, shard) for column in ("caption", "sound"))
        for caption_row, cut, unsupported in zip(captions, cuts, marked, strict=True):
            text = caption_row["caption"] or ""
            kept = [number for number in range(len(split_sentences(text))) if number not in (unsupported or ())]
            if caption_row["reject"] is None:
                assert cut["caption"] == keep_sentences(text, kept)
            num_dropped += len(unsupported or ())
    details = [report.details for report in read_manifest(claimed / "captions@sound").shards.values()]
    counts = {name: sum(each[name] for each in details) for name in ("num_sentences", "num_sentences_kept")}
    assert counts["num_sentences"] - counts["num_sentences_kept"] == num_dropped >= 8
    shorts = [row["caption"] for row in rows_of(claimed, "short", SHARDS[1])]
    assert shorts == [split_sentences(row["caption"])[0] for row in rows_of(claimed, "sound", SHARDS[1])]


def read_claims(run: Path, shard: str) -> list[list[int] | None]:
    return pq.read_table(run / "columns" / "claims" / f"{shard}.parquet")["unsupported_sentences"].to_pylist()


def test_a_pass_waits_for_claims_and_is_made_by_the_next_command(tmp_path: Path, monkeypatch, caplog) -> None:
    run = tmp_path / "run"
    write_run(run)
    command(run, *PASSES, monkeypatch=monkeypatch, do=caption)
    said = " ".join(caplog.text.split())
    assert "sound is not made yet: captioning.passes.sound drops what claims of 'caption' do not support" in said
    assert "of 2 of 2 shards" in said and "then `" in said and "short is not made yet" in said
    with pytest.raises(UserError, match=r"captioning.passes.sound drops what claims"):
        command(run, *PASSES, "captioning.only=sound", monkeypatch=monkeypatch, do=caption)


def test_claims_of_former_captions_do_not_count(run: Path, monkeypatch, caplog) -> None:
    before = read_manifest(run / "captions@sound")
    # A flag more writes the captions anew, with the same words: claims are asked nothing, and say so at once.
    judged = [*PASSES, 'captioning.quality.off_frame_phrases=["circle"]']
    command(run, *judged, monkeypatch=monkeypatch, do=caption)
    assert "sound is not made yet" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("captioning.claims.worker.load_asker", None)
        command(run, *judged, monkeypatch=patch, do=claims)
    command(run, *judged, monkeypatch=monkeypatch, do=caption)
    after = read_manifest(run / "captions@sound")
    assert {shard: report.source for shard, report in after.shards.items()} != {
        shard: report.source for shard, report in before.shards.items()
    }
    # Another threshold marks other sentences, and the pass follows it.
    strict = [*judged, "captioning.claims.threshold=1.0"]
    command(run, *strict, monkeypatch=monkeypatch, do=claims)
    # Until it does, it is no caption of these claims for anybody.
    for column in ("sound", "short"):
        of = f'captioning.claims.of=["{column}"]'
        with pytest.raises(UserError, match=r"sound/laion_00000.parquet was cut by other claims than are in .*/claims"):
            command(run, *strict[1:], "captioning.passes={}", of, monkeypatch=monkeypatch, do=claims)
    command(run, *strict, monkeypatch=monkeypatch, do=caption)
    rows = [row for shard in SHARDS for row in rows_of(run, "sound", shard) if row["reject"] is None]
    assert sum(row["flags"] == ["empty"] for row in rows) == sum(
        report.details["num_nothing_left"] for report in read_manifest(run / "captions@sound").shards.values()
    )
    assert sum(row["caption"] == "" for row in rows) >= 7, "of most captions nothing is that certain"


def test_claims_of_a_pass_that_waits_for_claims_keep_nobody_waiting(tmp_path: Path, monkeypatch, caplog) -> None:
    """Both columns are to be asked about, one of them the cut that needs claims of the other."""
    run = tmp_path / "run"
    write_run(run)
    both = (*PASSES, 'captioning.claims.of=["caption","sound"]')
    command(run, *both, monkeypatch=monkeypatch, do=caption)
    command(run, *both, monkeypatch=monkeypatch, do=claims)
    assert "claims of sound are left out for now" in caplog.text
    command(run, *both, monkeypatch=monkeypatch, do=caption)
    command(run, *both, monkeypatch=monkeypatch, do=claims)
    found = [read_manifest(run / "columns" / name) for name in ("claims", "claims@sound")]
    details = [[report.details["num_unsupported_claims"] for report in each.shards.values()] for each in found]
    assert sum(details[0]) >= 8 and sum(details[1]) == 0, "what is left is supported"
    # Captions that are written anew make both old, and the same commands make both again.
    judged = (*both, 'captioning.quality.off_frame_phrases=["circle"]')
    for do in (caption, claims, caption, claims):
        command(run, *judged, monkeypatch=monkeypatch, do=do)
    require_sound(run)


def test_claims_of_a_pass_of_some_shards(run: Path, monkeypatch) -> None:
    settings = (
        *PASSES,
        "captioning.passes.few={engine='cut',max_sentences=1,shards=['*0']}",
        'captioning.claims.of=["few"]',
    )
    with monkeypatch.context() as patch:
        command(run, *settings[:-1], "captioning.only=few", monkeypatch=patch, do=caption)
        command(run, *settings, monkeypatch=patch, do=claims)
    assert list(read_manifest(run / "columns" / "claims@few").shards) == [SHARDS[0]]

"""Choices of samples: what is chosen, what each clause removes, how it is written, and what makes it anew."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from columns_run import write_captions, write_columns

from errors import UserError
from pipelines.columns import written_choices
from pipelines.columns.choice_counts import by_source
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.columns.choices import Choice
from pipelines.columns.written_choices import finished_choice, read_chosen, write_choice
from pipelines.store.manifest import read_manifest

KEYS = ["a", "b", "c", "d"]
SHARDS = ["web_0", "web_1", "sam_0"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        {"key": "a", "caption": "A dog", "num_tokens": 3, "flags": ["loop"], "clip_score": 0.1},
        {"key": "b", "caption": "Cats", "num_tokens": 2, "clip_score": 0.2},
        {"key": "c", "caption": "Cows", "num_tokens": 9, "clip_score": math.nan},
        {"key": "d", "reject": "undecodable", "flags": None},
    ]
    write_captions(tmp_path / "captions", dict.fromkeys(SHARDS, rows), flags=["loop"])
    write_captions(
        tmp_path / "captions@short", {name: [{**row, "num_tokens": 1} for row in rows] for name in SHARDS}, flags=[]
    )
    write_pixels(tmp_path, [100, 600, 700, None])
    return tmp_path


def write_pixels(run: Path, sides: list[int | None]) -> None:
    write_columns(run / "columns" / "pixels", {name: {"key": KEYS, "min_side": sides} for name in SHARDS})


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.*") if path.is_file()]


def choice(run: Path, **keys: object) -> Choice:
    settings = ChoiceSettings.of("stage2", keys)
    assert settings is not None
    return Choice(run, settings)


def test_a_table_that_says_nothing_chooses_nothing() -> None:
    assert ChoiceSettings.of("stage2", {"captions": [{"column": "caption", "weight": 2.0}]}) is None


def test_each_clause_says_what_it_removes(run: Path) -> None:
    found = choice(run, where="min_side > 500 and clip_score < 1 and not flags.loop")
    manifest = write_choice(found, SHARDS)
    keys, chosen = read_chosen(run / "choices" / "stage2", "web_1")
    assert keys == KEYS
    assert chosen.tolist() == [False, True, False, False]
    assert (manifest.num_read, manifest.num_kept, manifest.rejected) == (12, 3, {"not_chosen": 9})
    assert manifest.extra["clauses"] == [
        {"text": "min_side > 500", "removes_alone": 6, "removes_after": 6, "unknown": 3},
        {"text": "clip_score < 1", "removes_alone": 6, "removes_after": 3, "unknown": 6},
        {"text": "not flags.loop", "removes_alone": 6, "removes_after": 0, "unknown": 3},
    ]
    assert (manifest.extra["num_samples"], manifest.extra["num_chosen"]) == (12, 3)
    assert manifest.extra["by_source"]["web_#"] == {"num_samples": 8, "num_chosen": 2}
    assert set(manifest.upstream) == {"captions", "columns/pixels"}
    assert by_source(found.count(SHARDS))["sam_#"].num_chosen == 1


def test_weights_are_numbers_of_what_is_chosen(run: Path) -> None:
    write_choice(choice(run, where="min_side > 50", weight="clip_score * 10"), SHARDS)
    table = pq.read_table(run / "choices" / "stage2" / "web_0.parquet")
    # c is chosen by where, but how often it is drawn is unknown.
    assert table["chosen"].to_pylist() == [True, True, False, False]
    assert table["weight"].to_pylist() == [pytest.approx(1.0), pytest.approx(2.0), None, None]
    weight = read_manifest(run / "choices" / "stage2").extra["weight"]
    assert (weight["unknown"], weight["zero"], weight["least"]) == (3, 0, pytest.approx(1.0))


def test_with_a_temperature_no_weight_is_too_large_or_lost(run: Path) -> None:
    write_choice(choice(run, where="min_side > 50", weight="min_side", weight_temperature=0.5), SHARDS)
    weights = pq.read_table(run / "choices" / "stage2" / "web_0.parquet")["weight"].to_pylist()
    assert weights[2] == 1.0  # relative to the largest: exp(1400) is no number
    assert 0 < weights[0] < 1e-37
    write_choice(choice(run, where="min_side > 50", weight="min_side", weight_temperature=100.0), SHARDS)
    weights = pq.read_table(run / "choices" / "stage2" / "web_0.parquet")["weight"].to_pylist()
    assert weights[1] == pytest.approx(math.exp(-1))


def test_captions_have_weights_of_their_own_columns(run: Path) -> None:
    captions = [
        {"column": "caption", "weight": "num_tokens"},
        {"column": "short", "weight": "num_tokens + clip_score"},
        {"column": "alt_text", "weight": 0.5},
    ]
    write_choice(choice(run, captions=captions), SHARDS)
    table = pq.read_table(run / "choices" / "stage2" / "web_0.parquet")
    assert table.column_names == ["key", "chosen", "weight", "weight.caption", "weight.short"]
    assert table["chosen"].to_pylist() == [True] * 4
    assert table["weight"].null_count == 4
    assert table["weight.caption"].to_pylist() == [3.0, 2.0, 9.0, None]
    assert table["weight.short"].to_pylist() == [pytest.approx(1.1), pytest.approx(1.2), None, None]


def test_nothing_is_done_where_nothing_has_changed(run: Path) -> None:
    chosen, folder = choice(run, where="min_side > 500"), run / "choices" / "stage2"
    write_choice(chosen, SHARDS)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files_of(folder)}
    assert finished_choice(choice(run, where="min_side > 500"), SHARDS) is not None
    write_choice(choice(run, where="min_side > 500"), SHARDS)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files_of(folder)} == before
    # Columns that it does not read may change; those that it reads may not, nor may the expression.
    write_captions(run / "captions", {"web_0": [{"key": key} for key in KEYS]}, flags=[])
    assert finished_choice(choice(run, where="min_side > 500"), SHARDS) is not None
    assert finished_choice(choice(run, where="min_side > 501"), SHARDS) is None
    write_pixels(run, [600, 600, 600, 100])
    assert finished_choice(choice(run, where="min_side > 500"), SHARDS) is None
    write_choice(choice(run, where="min_side > 500"), SHARDS)
    assert read_chosen(folder, "web_0")[1].tolist() == [True, True, True, False]


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"where": "min_side > 50", "weight": "min_side", "weight_temperature": 100.0}
    write_choice(choice(run, **keys), SHARDS)
    folder = run / "choices" / "stage2"
    expected = {path.name: path.read_bytes() for path in files_of(folder)}
    for path in [*files_of(folder), *(folder / ".done").iterdir()]:
        path.unlink()
    hash_file = written_choices.sha256_file

    def die(path: Path) -> str:
        if path.name == "web_0.parquet":
            raise KeyboardInterrupt
        return hash_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(written_choices, "sha256_file", die)
        with pytest.raises(KeyboardInterrupt):
            write_choice(choice(run, **keys), SHARDS)
    assert not (folder / "manifest.json").exists()
    write_choice(choice(run, **keys), SHARDS)
    assert {path.name: path.read_bytes() for path in files_of(folder)} == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"where": "min_side > 9000"},
            "keeps nothing: 0 of 12 .*removes 12 alone, of which 3",
        ),
        ({"weight": "0 * min_side"}, r"weight = .* is 0 for every sample"),
        ({"weight": "1e-60 * min_side"}, r"weight = .* is 0 for every sample"),
        ({"weight": "min_side - 300"}, "weight: min_side - 300 is -200 for 'a' of sam_0; a weight is 0 or more"),
        ({"weight": "1 / (min_side - 600)", "where": "min_side >= 600"}, "is inf for 'b'"),
        (
            {"weight": "log(-min_side)"},
            "keeps nothing: .*is never known; 12 samples of which it",
        ),
        ({"captions": [{"column": "short", "weight": "-num_tokens"}]}, "weight of short: -num_tokens is -1 for 'a'"),
        (
            {"captions": [{"column": "shrt", "weight": "num_tokens"}]},
            r"weight of shrt names 'shrt', .* \(did you mean short\?\)",
        ),
        ({"captions": [{"column": "short", "weight": "short.flags.loop"}]}, "weight of short.* a number is needed"),
        ({"where": "min_side"}, "where: 'min_side' is a number, and what is true or false is needed"),
        ({"weight": "flags.loop"}, "weight: 'flags.loop' is a bool"),
        ({"weight": "min_side ="}, "weight: .*write =="),
    ],
)
def test_what_cannot_be_trained_on_is_refused(run: Path, keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=rf"^features\.stage2\..*{message}"):
        write_choice(choice(run, **keys), ["web_0", "web_1", "sam_0"] if "captions" not in keys else ["web_0"])
    assert not list(run.glob("choices/*/*.parquet"))


def test_a_choice_that_keeps_everything_is_said_to(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_choice(choice(run, where="is_null(min_side) or min_side > 0"), SHARDS)
    assert "keeps everything: 12 of 12 samples are chosen" in caplog.text


def test_a_choice_of_nothing_names_what_makes_a_column_that_captions_have_no_values_of(tmp_path: Path) -> None:
    rows = [{"key": key, "caption": "A dog", "num_tokens": 3} for key in KEYS]
    write_captions(tmp_path / "captions", dict.fromkeys(SHARDS, rows), flags=[])
    message = (
        r"keeps nothing: .*unknown; .* before it; clip_score is known of no sample: .make columns .* clip_score in"
    )
    with pytest.raises(UserError, match=message) as error:
        write_choice(choice(tmp_path, where="clip_score > 0.2 and num_tokens > 1", weight="num_tokens"), SHARDS)
    # Nothing is left whose weight could be told of.
    assert "weight" not in str(error.value)

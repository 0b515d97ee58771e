"""The columns of a run by their names: which there are, what they hold, and what is said of those that are missing."""

from pathlib import Path

import pyarrow as pa
import pytest
from columns_run import write_captions, write_columns

from errors import UserError
from pipelines.columns.expressions import parse_expression
from pipelines.columns.sample_columns import SampleColumns

KEYS = ["a", "b", "c"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        {"key": "a", "caption": "A dog", "num_tokens": 3, "flags": ["loop", "empty"], "clip_score": 0.1, "width": 10},
        {"key": "b", "reject": "undecodable", "num_tokens": 5, "flags": []},
        {"key": "c", "caption": "Cats", "num_tokens": 2, "flags": [], "clip_score": 0.2, "width": 30},
    ]
    write_captions(tmp_path / "captions", {"s0": rows, "s1": rows}, flags=["empty", "loop"])
    short = [{"key": key, "caption": f"short {key}", "num_tokens": 1, "flags": ["loop"]} for key in KEYS]
    write_captions(tmp_path / "captions@short", {"s0": short}, flags=[])
    write_columns(
        tmp_path / "columns" / "pixels", {"s0": {"key": KEYS, "width": [11, None, 31], "min_side": [1, 2, 3]}}
    )
    write_columns(tmp_path / "columns" / "clip_score@short", {"s0": {"key": KEYS, "clip_score": [0.5, 0.6, 0.7]}})
    write_columns(tmp_path / "columns" / "sizes", {"s0": {"key": KEYS, "min_side": [7, 8, 9]}})
    return tmp_path


def test_each_name_is_a_column_in_raw_order(run: Path) -> None:
    columns = SampleColumns(run)
    names = ["width", "flags.loop", "short", "short.flags.loop", "short.clip_score", "sizes.min_side", "shard"]
    table = columns.read("s0", names)
    assert table["key"].to_pylist() == KEYS
    # A score's width is fresher than that of captions.
    assert table["width"].to_pylist() == [11, None, 31]
    assert table["flags.loop"].to_pylist() == [True, None, False]
    # Of a rejected sample nobody knows anything, though its row has a list without flags.
    unknown = columns.read("s0", ["flags", "num_tokens"]).to_pylist()[1]
    assert unknown == {"key": "b", "flags": None, "num_tokens": None}
    assert table["short"].to_pylist() == ["short a", "short b", "short c"]
    assert table["short.flags.loop"].to_pylist() == [True] * 3
    assert table["short.clip_score"].to_pylist() == [0.5, 0.6, 0.7]
    assert table["sizes.min_side"].to_pylist() == [7, 8, 9]
    assert table["shard"].to_pylist() == ["s0"] * 3
    assert columns.read("s1", []).to_pydict() == {"key": KEYS}


def test_the_schema_has_what_means_one_column(run: Path) -> None:
    schema = SampleColumns(run).schema()
    assert schema.field("flags.loop").type == pa.bool_()
    # Captions of before do not say which flags there are.
    assert {"flags.empty", "short.flags.off_frame", "pixels.min_side", "key", "shard"} <= set(schema.names)
    assert {"flags.off_frame", "min_side", "reject"}.isdisjoint(schema.names)


def test_in_a_captions_weight_bare_names_are_its_own_first(run: Path) -> None:
    columns = SampleColumns(run)
    table = columns.read("s0", ["clip_score", "num_tokens", "pixels.width"], caption="short")
    assert table["clip_score"].to_pylist() == [0.5, 0.6, 0.7]
    assert table["num_tokens"].to_pylist() == [1, 1, 1]
    assert table["pixels.width"].to_pylist() == [11, None, 31]
    assert columns.schema(caption="short").field("clip_score").type == pa.float64()
    assert columns.read("s0", ["clip_score"])["clip_score"].to_pylist()[0] == pytest.approx(0.1)


def test_in_a_captions_weight_what_scores_say_of_another_is_not_meant(run: Path) -> None:
    message = "no column 'clip_score' yet: `.* columns .* with clip_score in .* and alt_text in columns.caption_columns"
    with pytest.raises(UserError, match=message):
        SampleColumns(run).check(parse_expression("clip_score", key="w"), "number", shards=["s0"], caption="alt_text")
    SampleColumns(run).check(parse_expression("num_tokens", key="w"), "number", shards=["s0"], caption="alt_text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_side > 1", "min_side is a column of 2 scores: write pixels.min_side or sizes.min_side"),
        ("widht > 1", r"no column 'widht' \(did you mean width\?\)"),
        ("flags.lop", r"no column 'flags.lop' \(did you mean flags.loop\?\)"),
        ("not flags.refusal", "'flags.refusal'.*; captions of an older version get today's flags by `.* caption .*`"),
        ("not duplicate", "no column 'duplicate' yet: `.* columns .*`, with duplicates in columns.scores"),
        ("claims.unsupported_share < 1", "'claims.unsupported_share' yet: `.* claims .*` makes it"),
        ("short.unsupported_share < 1", "`.* claims .*`, with short in captioning.claims.of, makes it"),
        ("brief.clip_score < 1", "with clip_score in .* and brief in columns.caption_columns makes it"),
        ("brief.width < 1", r"no column 'brief.width' \(did you mean .*; there are"),
        ("unsupported_shar < 1", r"\(did you mean unsupported_share\?\)"),
        (
            "width > 20 and pixels.width > 30",
            "pixels, which has width, pixels.width, lacks 1 of 2 shards: s1; .*columns",
        ),
        ("short.num_tokens > 1", "captions@short, which has short.num_tokens, lacks 1 of 2 shards: s1; `.* caption "),
        ("num_tokens > 'a'", "brings together a number and a text"),
    ],
)
def test_what_is_missing_is_told_before_anything_runs(run: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^where.*{message}"):
        SampleColumns(run).check(parse_expression(text, key="where"), "bool", shards=["s0", "s1"])


def test_a_folder_that_has_not_finished_is_named(run: Path) -> None:
    (run / "columns" / "beauty").mkdir()
    (run / "columns" / "not a score").mkdir()
    with pytest.raises(UserError, match=r"no column 'fair'; .*columns/beauty has not finished: `.* columns .*goes on"):
        SampleColumns(run).check(parse_expression("fair > 1", key="where"), "bool", shards=["s0"])


def test_a_run_without_columns_is_told_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither captions nor other columns.*`.* columns"):
        SampleColumns(tmp_path).check(parse_expression("fair > 1", key="where"), "bool", shards=["s0"])


def test_files_of_other_samples_are_not_brought_together(run: Path) -> None:
    write_columns(run / "columns" / "sizes", {"s0": {"key": ["a", "c", "b"], "area": [7, 8, 9]}})
    with pytest.raises(UserError, match=r"sizes/s0.parquet and .*pixels/s0.parquet are not of.*in row 2 'c' and 'b'"):
        SampleColumns(run).read("s0", ["width", "area"])
    write_columns(run / "columns" / "sizes", {"s0": {"key": ["a", "b"], "area": [7, 8]}})
    with pytest.raises(UserError, match="they have 2 and 3 samples"):
        SampleColumns(run).read("s0", ["width", "area"])


def test_hashes_change_with_the_files_that_are_read_alone(run: Path) -> None:
    before = SampleColumns(run).hashes("s0", ["width", "num_tokens"])
    assert set(before) == {"columns/pixels", "captions"}
    write_columns(run / "columns" / "sizes", {"s0": {"key": KEYS, "min_side": [1, 1, 1]}})
    assert SampleColumns(run).hashes("s0", ["width", "num_tokens"]) == before
    write_columns(run / "columns" / "pixels", {"s0": {"key": KEYS, "width": [1, 1, 1]}})
    assert SampleColumns(run).hashes("s0", ["width", "num_tokens"]) != before

"""Tables that are joined by key: values of one type a column, nothing joined by chance, and what is missing counted."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.__main__ import main
from errors import UserError
from pipelines.columns.expressions import parse_expression
from pipelines.columns.sample_columns import SampleColumns
from pipelines.store.manifest import read_manifest
from tests.raw_shards import encode, photo, write_tar


@pytest.fixture
def join(tmp_path, monkeypatch):
    """Types `make columns` with a table called `laion` over two shards of three samples; gives the rows."""
    for shard, keys in (("a", ("1", "2", "3")), ("b", ("4", "5", "6"))):
        write_tar(tmp_path / f"raw/{shard}.tar", [(f"{key}.jpg", encode(photo(int(key)))) for key in keys])

    def make(files: str, *words: str) -> list[dict]:
        typed = ["--run", str(tmp_path / "run"), "--set", f"data.shards={tmp_path}/raw/*.tar"]
        typed += ["--set", "columns.scores=[]", "--set", f"columns.tables.laion.files={files}", *words]
        monkeypatch.setattr("sys.argv", ["curation", *typed])
        main()
        folder = tmp_path / "run/columns/laion"
        return pa.concat_tables([pq.read_table(folder / f"{shard}.parquet") for shard in "ab"]).to_pylist()

    return make


def test_rows_of_parquet_are_joined_with_their_types_and_nan_and_missing_rows_are_counted(tmp_path, join) -> None:
    table = pa.table(
        {
            "key": ["6", "2", "1", "4", "nobody"],
            "punsafe": pa.array([0.25, math.nan, None, 0.75, 1.0], pa.float32()),
            "LANGUAGE": ["en", "de", "fr", None, "it"],
            "n": [6, 2, 1, 4, 9],
            "is_nsfw": [True, False, None, False, True],
            "boxes": [[1.0], [], [], [], []],
        }
    )
    pq.write_table(table, tmp_path / "scores.parquet")
    rows = {row["key"]: row for row in join(f"{tmp_path}/scores.parquet")}
    assert list(rows) == ["1", "2", "3", "4", "5", "6"] and all(row["reject"] is None for row in rows.values())
    assert list(rows["6"].values()) == ["6", 0.25, "en", 6, True, None]
    assert rows["1"]["punsafe"] is None and math.isnan(rows["2"]["punsafe"]) and rows["4"]["language"] is None
    assert list(rows["3"].values()) == ["3", None, None, None, None, None]
    manifest = read_manifest(tmp_path / "run/columns/laion")
    assert manifest.shards["a"].details["nan_punsafe"] == 1
    assert manifest.shards["a"].details["null_punsafe"] == 2 and manifest.shards["b"].details["null_n"] == 1
    assert manifest.extra["score"]["columns"]["is_nsfw"]["type"] == "bool"
    # What expressions see is that.
    schema = SampleColumns(tmp_path / "run").schema()
    assert (schema.field("laion.n").type, schema.field("punsafe").type) == (pa.int64(), pa.float32())


def test_texts_of_csv_become_what_all_of_a_column_look_like(tmp_path, join) -> None:
    lines = ["name,score,count,good,code", "a/1.jpg,0.5,3,true,007", "2.jpg,nan,,False,8", "b/4.jpg,1,5,TRUE,x"]
    (tmp_path / "scores.csv").write_text("\n".join(lines))
    rows = {row["key"]: row for row in join(f"{tmp_path}/scores.csv#name,score,count,good,code")}
    assert (rows["1"]["score"], rows["1"]["count"], rows["1"]["good"], rows["1"]["code"]) == (0.5, 3, True, "007")
    assert math.isnan(rows["2"]["score"]) and rows["2"]["count"] is None and rows["2"]["code"] == "8"
    assert rows["4"]["score"] == 1.0


def test_numbers_of_float32_are_compared_as_float32_and_others_are_kept_whole(tmp_path, join) -> None:
    table = {"key": ["1", "2"], "short": pa.array([0.7, math.inf], pa.float32()), "long": [0.7, 1e300], "n": [1, 2.5]}
    pq.write_table(pa.table(table), tmp_path / "scores.parquet")
    rows = join(f"{tmp_path}/scores.parquet")
    assert [row["long"] for row in rows[:2]] == [0.7, 1e300] and [row["n"] for row in rows[:2]] == [1.0, 2.5]
    columns = SampleColumns(tmp_path / "run").read("a", ["short", "long"])
    for name in ("short", "long"):
        at_least = parse_expression(f"{name} >= 0.7", key="where").evaluate(columns)
        assert at_least.to_pylist() == [True, True, None]


def test_a_column_that_no_expression_could_name_is_left_out_and_refused_where_it_is_named(
    tmp_path, join, caplog
) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("key,class,Like,n\n1,7,8,9\n")
    assert list(join(str(path))[0]) == ["key", "n", "reject"]
    assert "left out are class, Like: " in caplog.text
    with pytest.raises(UserError, match="the column 'class' cannot be called 'class' in expressions: give it another"):
        join(f"{path}#key,class")


def test_a_changed_table_is_joined_anew_and_an_unchanged_one_is_not(tmp_path, join) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"key": "1", "v": 1}\n')
    assert join(str(path))[0]["v"] == 1
    file = tmp_path / "run/columns/laion/a.parquet"
    before = file.stat().st_mtime_ns
    join(str(path))
    assert file.stat().st_mtime_ns == before
    path.write_text('{"key": "1", "v": 2}\n{"key": "5", "v": 7}\n')
    assert [row["v"] for row in join(str(path))] == [2, None, None, None, 7, None]


def test_what_is_joined_by_chance_or_not_at_all_is_refused(tmp_path, join) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("key,v\n1,1\n2,2\n1,3\n")
    with pytest.raises(UserError, match=r"columns.tables.laion.files.*'1': row 1 of .*scores.csv and row 3 of"):
        join(str(path))
    path.write_text("key,v\n7,1\n8,2\n")
    for _ in range(2):  # nothing was written that would count as done
        with pytest.raises(UserError, match="none of its 2 rows names one of the 6 samples, whose keys are like '4'"):
            join(str(path))
    path.write_text("key,value\n1,1\n")
    with pytest.raises(UserError, match=r"no column 'valeu'.*did you mean value"):
        join(f"{path}#key,valeu")
    path.write_text("key,v\n1,1\n")
    write_tar(tmp_path / "raw/b.tar", [("1.jpg", encode(photo(1)))])
    with pytest.raises(UserError, match=r"row 1 of .* is of several samples, such as b/1"):
        join(str(path))
    with pytest.raises(UserError, match="a score is called pixels already"):
        join(str(path), "--set", f"columns.tables.pixels.files={path}")


def test_a_remembered_index_that_is_damaged_is_built_again(tmp_path, join) -> None:
    (tmp_path / "scores.csv").write_text("key,v\n1,1\n")
    join(f"{tmp_path}/scores.csv")
    (index,) = Path(tmp_path / "run/.tables").glob("*.sqlite")
    index.write_bytes(b"no database")
    assert join(f"{tmp_path}/scores.csv")[0]["v"] == 1

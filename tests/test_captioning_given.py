"""Captions that are there: own texts, folders, tars and tables joined by key or path, and nothing joined by chance."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioning.config import TAKEN_COLUMNS, CaptioningConfig
from captioning.given.addresses import MAIN_COLUMN
from captioning.given.index import TextIndex
from captioning.table import SCHEMA
from errors import UserError
from pipelines.raw.tables.places import place_of, sample_places
from pipelines.store.families import texts_digest
from pipelines.store.manifest import manifest_path, read_manifest
from pipelines.store.verify.file_checks import database_damage
from tests.given_run import RECIPE, command, rows_of, write_run
from tests.raw_shards import UNICODE_ALT_TEXTS, encode, photo, write_tar
from tests.sound_run import require_sound
from tests.tiny_models import save_clip


@pytest.fixture
def run(tmp_path) -> Path:
    """A shard of SA-1B with sa_0 … sa_9, and one of LAION with ten texts of its own."""
    return write_run(tmp_path)


def write_tables(run: Path, texts: dict[str, str]) -> dict[str, str]:
    """The same rows in every form there is; returns the address of each."""
    paths, values = list(texts), list(texts.values())
    pq.write_table(pa.table({"key": [Path(path).stem for path in paths], "caption": values}), run / "c.parquet")
    rows = [{"path": path, "prompt": text, "height": 30} for path, text in texts.items()]
    (run / "data_info.json").write_text(json.dumps(rows))
    with gzip.open(run / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"image": f"./{path}", "said": text}) + "\n" for path, text in texts.items())
    (run / "c.csv").write_text("file_name,text\n" + "".join(f'{path},"{text}"\n' for path, text in texts.items()))
    (run / "txt").mkdir()
    for path, text in texts.items():
        (run / "txt" / f"{Path(path).stem}.txt").write_bytes(text.encode("utf-16"))
    write_tar(run / "c.tar", [(f"{Path(path).stem}.txt", text.encode()) for path, text in texts.items()])
    return {
        "parquet": "c.parquet#key,caption",
        "data_info": "data_info.json",
        "gz": "c.jsonl.gz#image,said",
        "csv": "c.csv",
        "folder": "txt",
        "tar": "c.tar",
        "glob": "c.parq*#caption",
    }


def test_the_samples_own_texts_are_captions(run, monkeypatch, caplog) -> None:
    command(run, monkeypatch=monkeypatch)
    laion, sa1b = rows_of(run, "laion_00000"), rows_of(run, "sa_000000")
    assert [row["caption"] for row in laion.values()] == [UNICODE_ALT_TEXTS[number % 8].strip() for number in range(10)]
    for row in laion.values():
        assert row["caption"] == row["caption_raw"] and (row["width"], row["height"]) == (40, 30)
        assert [row[name] for name in ("prompt", "num_tokens", "finish_reason", "first_caption")] == [None] * 4
    assert {row["reject"] for row in sa1b.values()} == {"no_caption"}
    assert pq.read_schema(run / "captions" / "sa_000000.parquet").names == SCHEMA.names
    assert "10 rejected" in caplog.text
    require_sound(run)


def test_every_form_of_a_table_gives_the_same_bytes(run, monkeypatch) -> None:
    texts = {f"images/sa_{number}.jpg": f"a given caption, number {number} – ü" for number in range(10)}
    files = {}
    for form, address in write_tables(run, texts).items():
        command(run, "{run}/" + address, 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
        rows = rows_of(run, "sa_000000")
        assert {key: row["caption"] for key, row in rows.items()} == {Path(k).stem: v for k, v in texts.items()}, form
        files[form] = (run / "captions" / "sa_000000.parquet").read_bytes()
        assert len(list((run / ".texts").glob("*.sqlite"))) == 1, "indexes of other tables go"
    assert len(set(files.values())) == 1


def test_several_columns_and_a_reject_where_all_are_missing(run, monkeypatch, caplog) -> None:
    texts = {f"sa_{number}": f"dense {number}" for number in range(8)}
    short = {f"sa_{number}": f"short {number}" for number in range(5, 9)}
    pq.write_table(pa.table({"key": list(texts), "caption": list(texts.values())}), run / "dense.parquet")
    pq.write_table(pa.table({"id": list(short), "text": list(short.values())}), run / "short.parquet")
    table = '{caption = "{run}/dense.parquet", short = "{run}/short.parquet", own = "#txt"}'
    command(run, table, monkeypatch=monkeypatch)
    sa1b, laion = rows_of(run, "sa_000000"), rows_of(run, "laion_00000")
    assert (sa1b["sa_8"]["caption"], sa1b["sa_8"]["short"], sa1b["sa_8"]["flags"]) == ("", "short 8", ["empty"])
    assert (sa1b["sa_0"]["caption"], sa1b["sa_0"]["short"], sa1b["sa_0"]["own"]) == ("dense 0", None, None)
    assert {key: row["reject"] for key, row in sa1b.items() if row["reject"]} == {"sa_9": "no_caption"}
    assert [row["own"] for row in laion.values()] == [UNICODE_ALT_TEXTS[number % 8].strip() for number in range(10)]
    shards = read_manifest(run / "captions").shards
    assert shards["sa_000000"].details["num_without_short"] == 5
    assert shards["sa_000000"].details["num_without_caption"] == 1
    said = " ".join(caplog.text.split())
    assert "column short: 15 of the samples with a caption have no text here" in said
    command(run, table, "captioning.quality.max_repeated_ngram_ratio=0.5", monkeypatch=monkeypatch)
    assert rows_of(run, "sa_000000")["sa_8"]["short"] == "short 8", "judging anew keeps every column"
    require_sound(run)


def test_a_column_more_leaves_features_of_the_others_as_they_are(run, monkeypatch) -> None:
    for name in ("a", "b"):
        rows = [f"sa_{number}" for number in range(10)]
        pq.write_table(pa.table({"key": rows, "caption": [f"{name} {row}" for row in rows]}), run / f"{name}.parquet")

    def digests(table: str) -> dict[str, str]:
        command(run, table, 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
        captions = read_manifest(run / "captions")
        return {column: texts_digest(captions, [column]) for column in ("caption", "short", "alt_text")}

    one = digests("{run}/a.parquet")
    two = digests('{caption = "{run}/a.parquet", short = "{run}/b.parquet"}')
    assert (one["caption"], one["alt_text"]) == (two["caption"], two["alt_text"])
    (run / "moved").mkdir()
    (run / "a.parquet").rename(run / "moved" / "a.parquet")
    changed = digests('{caption = "{run}/moved/a.parquet", short = "{run}/moved/*"}')
    assert changed["caption"] == two["caption"] and changed["short"] != two["short"]


def test_a_table_that_changes_makes_captions_anew_and_one_that_is_touched_does_not(run, monkeypatch, caplog) -> None:
    pq.write_table(pa.table({"key": ["sa_1"], "caption": ["before"]}), run / "c.parquet")
    only = 'captioning.shards=["sa_*"]'
    command(run, "{run}/c.parquet", only, monkeypatch=monkeypatch)
    before = manifest_path(run / "captions").stat().st_mtime_ns
    (run / "c.parquet").touch()
    command(run, "{run}/c.parquet", only, monkeypatch=monkeypatch)
    assert manifest_path(run / "captions").stat().st_mtime_ns == before
    pq.write_table(pa.table({"key": ["sa_1"], "caption": ["after"]}), run / "c.parquet")
    command(run, "{run}/c.parquet", only, monkeypatch=monkeypatch)
    assert rows_of(run, "sa_000000")["sa_1"]["caption"] == "after"
    assert "made with other settings" in caplog.text


def test_rows_are_joined_by_whole_paths_and_never_by_chance(run, monkeypatch) -> None:
    """A path counts from its end; the more of it agrees the better, and of equal ones none is taken."""
    samples = ["dogs/1", "cats/1", "cats/2", "3", "4"]
    members = [(f"{key}.jpg", encode(photo(number))) for number, key in enumerate(samples)]
    write_tar(run / "pets" / "pets.tar", members)
    rows = {
        "data/dogs/1.jpg": "a dog",
        "data/cats/1.png": "a cat",
        "birds/2.jpg": "no cat",
        "a/3.jpg": "one",
        "b/3.jpg": "other",
        "pets/4.jpg": "by shard",
        "elsewhere/4.jpg": "by chance",
    }
    pq.write_table(pa.table({"path": list(rows), "caption": list(rows.values())}), run / "c.parquet")
    command(run, "{run}/c.parquet", "data.shards={run}/pets/*.tar", monkeypatch=monkeypatch)
    found = {key: row["caption"] or row["reject"] for key, row in rows_of(run, "pets").items()}
    expected = ("a dog", "a cat", "no_caption", "ambiguous_caption", "by shard")
    assert found == dict(zip(samples, expected, strict=True))


def test_two_rows_of_one_key_are_a_reject_that_names_both(run, monkeypatch, caplog, capsys) -> None:
    rows = [
        ("sa_1", "one"),
        ("sa_1", "other"),
        ("sa_2", "same"),
        ("sa_2", "same "),
        ("sa_99", "of nobody"),
        ("sa_3", None),
    ]
    (run / "c.jsonl").write_text("".join(json.dumps({"key": key, "caption": text}) + "\n" for key, text in rows))
    command(run, "{run}/c.jsonl", 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch, is_plan=True)
    plan = " ".join((caplog.text + capsys.readouterr().err).split())
    assert not (run / "captions").exists() and "6 rows of" in plan
    assert f"sa_1: row 1 of {run}/c.jsonl and row 2 of {run}/c.jsonl" in plan
    assert "1 of 6 rows have no text: no_text 1" in plan
    assert "7 of 10 samples have no row" in plan and "1 samples have several rows with different texts" in plan
    command(run, "{run}/c.jsonl", 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
    found = rows_of(run, "sa_000000")
    assert (found["sa_1"]["reject"], found["sa_2"]["caption"], found["sa_3"]["reject"]) == (
        "ambiguous_caption",
        "same",
        "no_caption",
    )


def test_keys_that_start_anew_in_every_shard_are_refused_unless_they_name_it(tmp_path, monkeypatch) -> None:
    for shard in ("a", "b"):
        write_tar(tmp_path / "raw" / f"{shard}.tar", [("0000.jpg", encode(photo(1))), ("0001.jpg", encode(photo(2)))])
    (tmp_path / "recipe.toml").write_text(RECIPE)
    pq.write_table(pa.table({"key": ["0000"], "caption": ["of which?"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"row 1 is of b/0000 and of a sample of shard a alike: .* shard/key"):
        command(tmp_path, "{run}/c.parquet", monkeypatch=monkeypatch)
    pq.write_table(pa.table({"key": ["a/0000", "b/0000"], "caption": ["of a", "of b"]}), tmp_path / "c.parquet")
    command(tmp_path, "{run}/c.parquet", monkeypatch=monkeypatch)
    assert [rows_of(tmp_path, shard)["0000"]["caption"] for shard in ("a", "b")] == ["of a", "of b"]


def test_a_table_of_other_samples_is_an_error_before_anything_is_written(run, monkeypatch) -> None:
    pq.write_table(pa.table({"key": ["x/1.jpg"], "caption": ["text"], "n": [1]}), run / "c.parquet")
    with pytest.raises(UserError, match=r"none of its 1 rows is of one of the 20 samples: its keys are like 'x/1'"):
        command(run, "{run}/c.parquet", monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=r"c.parquet: no column 'nothing'; columns are key, caption, n; write"):
        command(run, "{run}/c.parquet#key,nothing", monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=r"captioning\.table: caption = .*: no file matches .*nothing\.parquet"):
        command(run, "{run}/nothing.parquet", monkeypatch=monkeypatch)
    (run / "c.csv").write_text('key,caption\nsa_0,a dog\nsa_1,"a cat\nsa_2,a lamp\n')
    with pytest.raises(UserError, match=r"c\.csv: line 3: the quotation mark .* is never closed; put the whole field"):
        command(run, "{run}/c.csv", monkeypatch=monkeypatch)
    assert not (run / "captions").exists()


def test_limits_are_completed_and_faulty_images_are_rejects(run, monkeypatch) -> None:
    members = [("a.jpg", encode(photo(1))), ("a.txt", b"text a"), ("b.jpg", b"no image"), ("b.txt", b"text b")]
    members += [("c.jpg", encode(photo(2, 80, 60))), ("c.txt", b"\xff\xfe\x00"), ("d.jpg", encode(photo(2, 80, 60)))]
    write_tar(run / "raw" / "odd.tar", [*members, ("d.txt", b"text d")])
    only = 'captioning.shards=["odd"]'
    command(run, "", only, "data.max_pixels=1200", monkeypatch=monkeypatch)
    reasons = {key: row["reject"] for key, row in rows_of(run, "odd").items()}
    assert reasons == {"a": None, "b": "not_an_image", "c": "too_many_pixels", "d": "too_many_pixels"}
    command(run, "", only, "data.max_pixels=1000000", monkeypatch=monkeypatch)
    rows = rows_of(run, "odd")
    assert {key: row["reject"] for key, row in rows.items()} == {
        "a": None,
        "b": "not_an_image",
        "c": "not_utf8",
        "d": None,
    }
    assert rows["d"]["caption"] == "text d"


def test_given_captions_are_scored_and_scores_change_no_text(run, tmp_path, monkeypatch) -> None:
    only = 'captioning.shards=["laion_*"]'
    command(run, "", only, monkeypatch=monkeypatch)
    plain = read_manifest(run / "captions")
    command(
        run,
        "",
        only,
        f"captioning.clip_model={save_clip(tmp_path / 'clip')}",
        "engine.gpus_per_worker=0.0",
        monkeypatch=monkeypatch,
    )
    scored = read_manifest(run / "captions")
    assert all(-1 <= row["clip_score"] <= 1 for row in rows_of(run, "laion_00000").values())
    assert texts_digest(plain, ["caption"]) == texts_digest(scored, ["caption"])
    assert plain.fingerprint.digest != scored.fingerprint.digest


def test_a_damaged_index_is_built_again(run, monkeypatch, caplog) -> None:
    pq.write_table(pa.table({"key": ["sa_1"], "caption": ["text"]}), run / "c.parquet")
    command(run, "{run}/c.parquet", monkeypatch=monkeypatch, is_plan=True)
    (index,) = (run / ".texts").glob("*.sqlite")
    assert database_damage(index) is None
    index.write_bytes(index.read_bytes()[:5000])
    assert "damaged" in (database_damage(index) or "")
    command(run, "{run}/c.parquet", monkeypatch=monkeypatch, is_plan=True)
    assert "its table is read again" in " ".join(caplog.text.split())
    assert TextIndex(index).find(sample_places("sa_000000", "sa_1")).text == "text"


def test_names_of_columns_and_settings_that_mean_nothing_are_refused() -> None:
    assert {*TAKEN_COLUMNS, MAIN_COLUMN} == set(SCHEMA.names)
    for table in ({"short": "x"}, {"caption": "x", "Flags": "x"}, {"caption": "x", "flags": "x"}, {"caption": ""}):
        with pytest.raises(ValueError, match="column"):
            CaptioningConfig.model_validate({"engine": "given", "table": table})
    with pytest.raises(ValueError, match='for engine = "given"'):
        CaptioningConfig.model_validate({"table": "x"})


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("images/sa_1.jpg", "sa_1/images"),
        ("./a/b.v2.JPEG", "b.v2/a"),
        ("C:\\photos\\7.png", "7/photos/C:"),
        ("https://x.org/a/7.jpg?w=1", "7/a/x.org"),
        ("v1.5", "v1.5"),
        ("x.jpg.txt", "x"),
        (" 12 ", "12"),
    ],
)
def test_a_name_is_a_place(name: str, place: str) -> None:
    assert place_of(name) == place

"""One caption set in every layout there is: the same keys, the same texts, the same numbers."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_shards import encode, photo, write_tar
from stats_run import run_stage

from dataset_stats import sources
from dataset_stats.__main__ import main
from errors import UserError
from pipelines.store.summary import read_summary
from tests.given_run import command as caption_given
from tests.given_run import write_run as write_given_run

TEXTS = {f"sa_{number}": f"A red dog, {number} cats and a café near bench {number % 3}." for number in range(24)}
BAD = {"sa_90": b"the dog\x92s bench", "sa_91": b"  "}
RAW = {key: text.encode() for key, text in TEXTS.items()} | BAD
# No layout tells texts of several encodings apart by row, but for files of their own.
MARKED = {"sa_0": TEXTS["sa_0"].encode("utf-16"), "sa_1": b"\xef\xbb\xbf" + TEXTS["sa_1"].encode()}
ROWS = [(key, text.decode(errors="surrogateescape")) for key, text in RAW.items()]


def write(path: Path, text: str) -> None:
    data = text.encode(errors="surrogateescape")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def strings(values: list[bytes]) -> pa.Array:
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def write_all(folder: Path) -> dict[str, str]:
    """The set in every layout; what to type for each."""
    csv = "".join(f'{key},"{text}"\n' for key, text in ROWS)
    tsv = "".join(f"{key}\t{text}\n" for key, text in ROWS)
    write(folder / "a.csv", "key,caption\n" + csv)
    write(folder / "a.csv.gz", "image_id,text\n" + csv)
    write(folder / "a.tsv", "file_name\tprompt\n" + tsv.replace("\t", ".jpg\t"))
    write(folder / "a.jsonl", "".join(f"{json_text({'id': key, 'caption': text})}\n" for key, text in ROWS))
    write(folder / "a.jsonl.gz", "".join(f"{json_text({'key': key, 'captions': [text, ' ']})}\n" for key, text in ROWS))
    write(folder / "data_info.json", json_text([{"path": f"{key}.jpg", "prompt": text} for key, text in ROWS]))
    coco = {"images": [{"id": 1}], "annotations": [{"image_id": key, "caption": text} for key, text in ROWS]}
    write(folder / "coco.json", json_text(coco))
    write(folder / "by_key.json", json_text({f"{key}.png": text for key, text in ROWS}))
    for part in ("train/a", "train/b"):
        half = list(RAW.items())[:13] if part.endswith("a") else list(RAW.items())[13:]
        table = pa.table({"__key__": [key for key, _ in half], "TEXT": strings([text for _, text in half])})
        (folder / "rows" / part).mkdir(parents=True)
        pq.write_table(table, folder / "rows" / part / "0.parquet")
        (folder / "saved").mkdir(exist_ok=True)
        with pa.ipc.new_stream(folder / "saved" / f"data-{part[-1]}.arrow", table.schema) as writer:
            writer.write_table(table)
    write(folder / "saved" / "state.json", "{}")
    write(folder / "saved" / "dataset_info.json", "{}")
    for number, (key, text) in enumerate((RAW | MARKED).items()):
        (folder / "texts").mkdir(exist_ok=True)
        (folder / "texts" / f"{key}.{('txt', 'caption', 'jpg.txt')[number % 3]}").write_bytes(text)
    write(folder / "texts" / "sa_3.caption", "what counts last")
    write(folder / "texts" / "README.txt", "One text per image.")
    write_tar(
        folder / "a.tar",
        [
            (f"./{key}.{name}", text)
            for (key, text), name in zip((RAW | MARKED).items(), 13 * ["txt", "png.txt"], strict=True)
        ],
    )
    names = ("a.csv", "a.csv.gz", "a.tsv", "a.jsonl", "a.jsonl.gz", "data_info.json", "coco.json", "by_key.json")
    names = (*names, "rows", "saved", "texts", "a.tar", "rows/train/*/0.parquet")
    return {f"s{number}": str(folder / name) for number, name in enumerate(names)}


def test_every_layout_gives_the_same_table(tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(sources.log, "warning", warnings.append)
    typed = write_all(tmp_path / "data")
    run_stage(tmp_path / "run", f"dataset_stats.sets={','.join(f'{name}={path}' for name, path in typed.items())}")
    summary = read_summary(tmp_path / "run")["dataset_stats"]
    first = summary["s0"]
    assert (first["num_captions"], first["rejected"]) == (24, {"blank_text": 1, "not_utf8": 1})
    assert {name: found for name, found in summary.items() if found != first} == {}
    counts = list((tmp_path / "run" / "stats" / "counts").glob("*.captions.parquet"))
    keys = {path.name: set(pq.read_table(path)["key"].to_pylist()) for path in counts}
    wrong = {name: found - set(RAW) for name, found in keys.items() if not found <= set(RAW)}
    assert wrong == {} and sum(map(len, keys.values())) == (len(typed) - 1) * len(RAW), "two sets share files"
    (said,) = [warning for warning in warnings if "captions" in warning]
    assert "a.jsonl.gz: column 'captions' holds lists of texts; of each, the first that is not blank counts" in said


def test_a_text_of_a_list_is_named_by_its_place_as_in_captioning(tmp_path):
    rows = [{"key": key, "captions": [text, "a dog and a cat"], "short[1]": text} for key, text in TEXTS.items()]
    write(tmp_path / "a.jsonl", "".join(f"{json_text(row)}\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = {
        "first": ("jsonl", "captions"),
        "second": ("jsonl", "captions[1]"),
        "other": ("parquet", "captions[1]"),
        "called": ("parquet", "short[1]"),
    }
    sets = ", ".join(
        f'{name} = {{files = "{tmp_path}/a.{kind}", column = "{column}"}}' for name, (kind, column) in columns.items()
    )
    run_stage(tmp_path / "run", f"dataset_stats.sets={{{sets}}}")
    summary = read_summary(tmp_path / "run")["dataset_stats"]
    assert summary["first"] == summary["called"] and summary["second"] == summary["other"] != summary["first"]
    for column, said in {
        "captions[2]": r"24 of 24 samples rejected .*: no_text 24",
        "caption[1]": r"no column 'caption'; .*did you mean captions",
    }.items():
        with pytest.raises(UserError, match=said):
            run_stage(
                tmp_path / "run", f'dataset_stats.sets={{x = {{files = "{tmp_path}/a.jsonl", column = "{column}"}}}}'
            )


def test_lines_of_text_and_released_files_of_a_caption_each(tmp_path):
    write(tmp_path / "lines.txt", "\n".join(TEXTS.values()) + "\n")
    for key, text in TEXTS.items():
        write(tmp_path / "captions" / f"{key}.txt", text)
    run_stage(tmp_path / "run", f"dataset_stats.sets=lines={tmp_path}/lines.txt,files={tmp_path}/captions")
    summary = read_summary(tmp_path / "run")["dataset_stats"]
    assert summary["lines"] == summary["files"] and summary["files"]["num_captions"] == 24


def test_many_files_of_text_are_not_taken_for_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_FILES", 3)
    for key, text in TEXTS.items():
        write(tmp_path / "captions" / f"{key}.txt", text)
    with pytest.raises(UserError, match=r"sets\.x\.files: .*\*\.txt is 24 files of texts; .* name their folder"):
        run_stage(tmp_path / "run", f"dataset_stats.sets=x={tmp_path}/captions/*.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.xlsx",
            b"PK",
            r"sets\.x\.files: .*a\.xlsx is not called as a file of captions is: CSV, TSV, .*or a tar, or",
        ),
        ("a.parquet", b"", r"a\.parquet is empty: it was not written or fetched to its end"),
        ("a.csv", b"<!DOCTYPE html>", r"a\.csv is a web page that was saved under this name"),
        ("a.csv", b'key,caption\n0,"a\n1,b\n', r"a\.csv: line 2: the quotation mark .* is never closed"),
        ("a.json", b'{"a": [{"text": "x"}], "b": [{"text": "x"}]}', r"a\.json holds several lists \(a, b\)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        run_stage(tmp_path / "run", f"dataset_stats.sets=x={tmp_path}/{name}")


def test_one_cut_parquet_of_many_is_named(tmp_path):
    for number in range(3):
        pq.write_table(pa.table({"caption": ["a red dog"] * 20}), tmp_path / f"{number}.parquet")
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"1\.parquet is no readable table \(.*\); fetch or write it again"):
        run_stage(tmp_path / "run", f"dataset_stats.sets=x={tmp_path}/*.parquet")
    # What is damaged in the middle shows only when it is read.
    (tmp_path / "1.parquet").write_bytes(whole[:4] + bytes(60) + whole[64:])
    with pytest.raises(UserError, match=r"1\.parquet is no readable table"):
        run_stage(tmp_path / "run", f"dataset_stats.sets=x={tmp_path}/*.parquet")


def test_a_layout_that_is_typed_is_taken_as_typed(tmp_path):
    write(tmp_path / "captions.data", "key,caption\n1,a red dog\n")
    files = f'files = "{tmp_path}/captions.data"'
    run_stage(tmp_path / "run", f'dataset_stats.sets={{x = {{layout = "csv", {files}}}}}')
    assert read_summary(tmp_path / "run")["dataset_stats"]["x"]["num_captions"] == 1
    write(tmp_path / "lines.txt", "a red dog\n")
    with pytest.raises(UserError, match=r'lines\.txt is no tar; of layout "text", name tars or the folder'):
        run_stage(tmp_path / "run", f'dataset_stats.sets={{x = {{layout = "text", files = "{tmp_path}/lines.txt"}}}}')


def test_a_folder_of_several_kinds_and_one_of_none_are_refused(tmp_path):
    write(tmp_path / "both" / "a.csv", "caption\na dog\n")
    write(tmp_path / "both" / "a.jsonl", '{"caption": "a dog"}\n')
    with pytest.raises(
        UserError, match=r"both holds csv \(a\.csv\) and jsonl \(a\.jsonl\), and only one .*both/\*\.csv"
    ):
        run_stage(tmp_path / "run", f"dataset_stats.sets=x={tmp_path}/both")
    write(tmp_path / "none" / "README.txt", "nothing")
    with pytest.raises(UserError, match=r"none holds no captions"):
        run_stage(tmp_path / "run", f"dataset_stats.sets=x={tmp_path}/none")


def test_a_path_that_exists_is_no_pattern_and_no_address(tmp_path, monkeypatch):
    write(tmp_path / "a#b [1] {x,y}" / "c.csv", "caption\na dog\n")
    run_stage(tmp_path / "run", f"dataset_stats.sets=x={tmp_path}/a#b [1] {{x,y}}/c.csv")
    assert read_summary(tmp_path / "run")["dataset_stats"]["x"]["num_captions"] == 1
    write(tmp_path / "texts" / "a.txt", "a dog")
    monkeypatch.chdir(tmp_path)
    run_stage(tmp_path / "run", "dataset_stats.sets=x=texts")
    assert read_summary(tmp_path / "run")["dataset_stats"]["x"]["num_captions"] == 1


def test_texts_of_raw_shards_of_every_kind(tmp_path):
    """A tar, a folder and Parquet with the same images and texts; also by the name of one of several texts."""
    pictures = {f"{number:03d}": encode(photo(number)) for number in range(4)}
    texts = {key: f"A dog near {number} cats." for number, key in enumerate(pictures)}
    members = [(f"{key}.jpg", data) for key, data in pictures.items()]
    others = [(f"{key}.json", json.dumps({"title": "a lamp"}).encode()) for key in pictures]
    write_tar(
        tmp_path / "raw" / "a.tar", sorted([*members, *others, *((f"{k}.txt", t.encode()) for k, t in texts.items())])
    )
    for name, data in [*members, *((f"{key}.txt", text.encode()) for key, text in texts.items())]:
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    columns = {"image": list(pictures.values()), "caption": list(texts.values()), "title": ["a lamp"] * 4}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    found = {}
    for name in ("raw/a.tar", "folder", "b.parquet"):
        shards = f"data.shards={tmp_path / name}"
        run_stage(tmp_path / f"run-{Path(name).stem}", 'dataset_stats.sets={raw = {layout = "raw"}}', shards)
        found[name] = read_summary(tmp_path / f"run-{Path(name).stem}")["dataset_stats"]["raw"]
    assert found["raw/a.tar"] == found["folder"] == found["b.parquet"] and found["folder"]["num_captions"] == 4
    named = 'dataset_stats.sets={raw = {layout = "raw", column = "title"}}'
    for name in ("raw/a.tar", "b.parquet"):
        run_stage(tmp_path / "named", named, f"data.shards={tmp_path / name}")
        assert read_summary(tmp_path / "named")["dataset_stats"]["raw"]["distinct_nouns"] == 1


def test_texts_that_are_captions_as_they_came_are_counted_once(tmp_path, monkeypatch):
    """By default alt texts stand beside captions; of a folder of one's own captions they were two columns alike."""
    run = write_given_run(tmp_path / "run")
    caption_given(run, monkeypatch=monkeypatch)
    argv = ["dataset_stats", "--recipe", str(run / "recipe.toml"), "--run", str(run)]
    argv += ["--set", "dataset_stats.tagger=textblob", "--set", "engine.gpus_per_worker=0"]
    monkeypatch.setattr("sys.argv", argv)
    main()
    assert list(read_summary(run)["dataset_stats"]) == ["caption"]
    monkeypatch.setattr("sys.argv", [*argv, "--text", "dataset_stats.sets=a=*#alt_text,b=*#caption"])
    main()
    assert list(read_summary(run)["dataset_stats"]) == ["a", "b"], "what is typed is counted"

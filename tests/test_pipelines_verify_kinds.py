"""Each kind of file that a run can have, damaged in each way, is named by `make verify` with what to do about it."""

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file
from sound_run import require_sound
from tiny_checkpoint import write_checkpoint

from errors import MissingFileError
from pipelines.raw.kinds.tar_shards import read_tar_headers
from pipelines.raw.shard_headers import HeaderCache
from pipelines.run_memory import remember_found
from pipelines.store.files import open_ranges, sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from pipelines.store.verify.__main__ import main
from pipelines.store.verify.run import verify_run


def write_folder(
    path: Path, tables: tuple[str, ...], *, has_manifest: bool = True, files: tuple[str, ...] = ()
) -> None:
    """Write what a room leaves: tables as shards with their markers, a manifest that knows `files` beside them."""
    directory, fingerprint = ShardDirectory(path), Fingerprint.of({"version": 1})
    path.mkdir(parents=True, exist_ok=True)
    for name in tables:
        file = directory.file(name, ".parquet")
        if not file.is_file():
            pq.write_table(pa.table({"key": [f"{name}-{i}" for i in range(300)]}), file)
        report = ShardReport(name=name, source=name, num_read=300, num_kept=300, files={".parquet": sha256_file(file)})
        directory.write_marker(report, fingerprint)
    if has_manifest:
        hashes = {name: sha256_file(path / name) for name in files}
        directory.write_manifest(fingerprint, tables, upstream={}, extra={"files": hashes})


def write_samples(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = []
    for number, key in enumerate(("cat", "dog")):
        chunks = PngImagePlugin.PngInfo()
        for name, value in {"prompt": f"a {key}", "seed": str(number), "checkpoint": "c"}.items():
            chunks.add_itxt(name, value)
        noise = np.random.default_rng(number).integers(0, 256, (24, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{key}.png", pnginfo=chunks)
        rows.append({"file": f"{key}.png", "key": key, "prompt": f"a {key}", "seed": number, "width": 16, "height": 24})
    Image.new("RGB", (40, 40), "white").save(folder / "grid.png")
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    write_folder(folder, ("samples",))


def write_run(run: Path) -> None:
    for name in ("report.html", "table1.md", "nouns.csv"):
        (run / "stats").mkdir(parents=True, exist_ok=True)
        (run / "stats" / name).write_text("<html>words, and more words than one line</html>\n")
    pq.write_table(pa.table({"noun": ["cat"]}), run / "stats" / "nouns.parquet")
    write_folder(run / "stats", (), files=("report.html", "table1.md", "nouns.csv", "nouns.parquet"))
    write_folder(run / "stats" / "counts", ("laion_0.caption.nouns",))
    write_folder(run / "captions", ("laion_0", "laion_1"))
    write_folder(run / "judge", ("captions", "stage2"), has_manifest=False)
    write_samples(run / "samples" / "stage2")
    stage = run / "training" / "stage2"
    for step in (6, 12):
        write_checkpoint(stage, step, zero_stage=2, num_ranks=2)
    (stage / "latest").write_text("step-12\n")
    for name in ("survey.json", "memory.json"):
        (stage / name).write_text("{}\n")
    (stage / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    lists, cache = run / "evaluation" / "cache" / "lists", run / "evaluation" / "cache" / "clip-0"
    lists.mkdir(parents=True)
    (lists / "0.jsonl").write_text('{"key": "a"}\n{"key": "of another length"}\n')
    write_folder(cache, ("images",))
    save_file({"mean": np.ones(3)}, cache / "statistics.safetensors")
    data = b"features of somewhere else"
    copy = run / "training" / "cache" / "x" / "laion_0.tar"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(data)
    copy.parent.rename(copy.parent.with_name(sha256_file(copy)))
    (run / "summary.json").write_text('{"seconds": {}}\n')
    (run / "index.html").write_text("<html></html>\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # Beyond the headers of small files, where nothing but a checksum can tell; JSON begins with a brace.
    data[0 if path.suffix in (".json", ".jsonl") else len(data) // 2] ^= 0x80
    path.write_bytes(data)


def gone(path: Path) -> None:
    path.unlink()


COPY = "it is a copy, and the next command that needs it makes it anew"
RESTORE = "restore it from a copy, or `rm -r "
STATE = "training/stage2/step-6/deepspeed/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
# Path below the run, ways of damage, what is said of each, what to do.
DAMAGES: list[tuple[str, dict[Callable[[Path], None], str], str]] = [
    (
        "captions/laion_1.parquet",
        {
            cut: "SHA-256 of laion_1.parquet is not the manifest's",
            empty: "SHA-256 of",
            flip: "SHA-256",
            gone: "missing",
        },
        "make caption RUN=",
    ),
    (
        "captions/.done/laion_1.json",
        {cut: "is damaged", empty: "is empty", flip: "damaged", gone: "not exist"},
        "make caption",
    ),
    ("captions/.manifest.json", {cut: "is damaged", empty: "is empty", flip: "damaged"}, "it is summed up anew"),
    (
        "stats/counts/laion_0.caption.nouns.parquet",
        {cut: "SHA-256", empty: "SHA-256", flip: "SHA-256", gone: "missing"},
        "make stats",
    ),
    (
        "stats/report.html",
        {cut: "is cut short", empty: "is empty", flip: "not as it was", gone: "not exist"},
        "make stats",
    ),
    (
        "stats/table1.md",
        {cut: "is cut short", empty: "is empty", flip: "not as it was", gone: "not exist"},
        "make stats",
    ),
    (
        "stats/nouns.csv",
        {cut: "is cut short", empty: "is empty", flip: "not as it was", gone: "not exist"},
        "make stats",
    ),
    (
        "stats/nouns.parquet",
        {cut: "not readable as Parquet", empty: "Parquet", flip: "nouns.parquet", gone: "not exist"},
        "make stats",
    ),
    (
        "judge/stage2.parquet",
        {cut: "is not its marker's", empty: "SHA-256", flip: "SHA-256", gone: "missing"},
        "make judge",
    ),
    ("judge/.done/stage2.json", {cut: "is damaged", empty: "is empty", flip: "is damaged"}, "make judge"),
    (
        "samples/stage2/samples.parquet",
        {cut: "SHA-256", empty: "SHA-256", flip: "SHA-256", gone: "missing"},
        "make sample STAGE=stage2",
    ),
    (
        "samples/stage2/cat.png",
        {cut: "cut short or overwritten", empty: "it is empty", flip: "(CRC-32)", gone: "is missing, though samples"},
        "make sample STAGE=stage2 RUN=",
    ),
    (
        "samples/stage2/grid.png",
        {cut: "cut short", empty: "it is empty", flip: "CRC-32", gone: "not exist"},
        "make sample",
    ),
    (STATE, {cut: "is cut short or overwritten", empty: "is empty", flip: "checksum", gone: "does not exist"}, RESTORE),
    (
        "training/stage2/step-6/trainer.json",
        {cut: "is damaged", empty: "is empty", flip: "damaged", gone: "not exist"},
        RESTORE,
    ),
    (
        "training/stage2/step-6/model/config.json",
        {cut: "is damaged", empty: "is empty", flip: "damaged", gone: "not exist"},
        RESTORE,
    ),
    (
        "training/stage2/step-6/model/diffusion_pytorch_model.safetensors",
        {cut: "is cut short or overwritten", empty: "is empty", gone: "does not exist"},
        RESTORE,
    ),
    (
        "training/stage2/latest",
        {cut: "names 'step', which is not there", empty: "is empty"},
        "the newest whole checkpoint",
    ),
    ("training/stage2/memory.json", {cut: "is damaged", empty: "is empty", flip: "is damaged"}, COPY),
    ("training/stage2/survey.json", {cut: "is damaged", empty: "is empty", flip: "is damaged"}, COPY),
    ("evaluation/cache/lists/0.jsonl", {cut: "is cut short", empty: "is empty", flip: "line 1 is no JSON"}, COPY),
    ("evaluation/cache/clip-0/statistics.safetensors", {cut: "is cut short", empty: "is empty"}, COPY),
    ("summary.json", {cut: "is damaged", empty: "is empty", flip: "is damaged"}, "each command writes its figures"),
    ("index.html", {cut: "is cut short", empty: "is empty"}, "make report RUN="),
]
CASES = [(name, way, said, mend) for name, ways, mend in DAMAGES for way, said in ways.items()]


@pytest.mark.parametrize(
    ("name", "way", "said", "mend"), CASES, ids=[f"{name.rsplit('/', 1)[-1]}-{way.__name__}" for name, way, *_ in CASES]
)
def test_every_kind_of_damage_is_named_with_what_to_do(run, name, way, said, mend):
    way(run / name)
    (problem,) = verify_run(run).problems
    assert said in str(problem) and mend in problem.mend
    assert (run / name).name in f"{problem} {problem.mend}" or (run / name).stem in str(problem)
    assert problem.directory in (run / name).parents


def test_an_undamaged_run_is_sound_and_all_of_it_is_known(run):
    findings = require_sound(run)
    assert findings.others == set() and findings.notes == []
    assert {path.name for path in findings.unchecked} == set()


def test_what_a_user_keeps_beside_ours_is_no_problem(run):
    stage = run / "training" / "stage2"
    (stage / "step-12").rename(stage / "step-12-best")
    (stage / "latest").write_text("step-6\n")
    (stage / "step-12-best" / "trainer.json").write_text("mine")
    for name in ("notes.txt", "samples/stage2/notes.txt", "captions/thoughts.md", "mine/captions/x.parquet"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    (run / "samples" / "stage2" / "favourite.png").write_bytes(b"mine")
    findings = require_sound(run, unfinished=["training/stage2"])
    assert len(findings.others) == 5 + 6
    (note,) = findings.notes
    assert note == f"{run / 'samples/stage2'}: 1 files are not in its manifest.json, such as favourite.png"


def test_images_that_are_not_what_their_table_says_are_named(run):
    folder = run / "samples" / "stage2"
    (folder / "dog.png").write_bytes((folder / "cat.png").read_bytes())
    (problem,) = verify_run(run).problems
    assert "key dog: dog.png: its prompt is 'a cat', but samples.parquet says 'a dog'" in str(problem)


def test_a_torn_line_of_a_log_and_a_missing_latest_are_notes(run):
    stage = run / "training" / "stage2"
    with (stage / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')
    (stage / "latest").unlink()
    first, second = require_sound(run).notes
    assert first.endswith("there is no latest; commands take the newest whole checkpoint")
    assert second.endswith("metrics.jsonl: 1 of its lines are torn, and are left out when it is read")


def test_a_shard_of_one_rank_that_was_never_there_is_named(run):
    trainer = run / "training" / "stage2" / "step-12" / "trainer.json"
    trainer.write_text(json.dumps(json.loads(trainer.read_text()) | {"num_ranks": 3}))
    (problem,) = verify_run(run).problems
    assert "step-12: deepspeed/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt does not exist" in str(problem)


def test_weights_that_are_not_finite_are_named(run):
    path = run / "training" / "stage2" / "step-6" / "model" / "diffusion_pytorch_model.safetensors"
    save_file({"first": np.ones(4, np.float32), "second": np.array([1, np.inf], np.float16)}, path)
    (problem,) = verify_run(run).problems
    assert "holds numbers that are not finite, first in second" in str(problem)


def test_an_interrupted_training_says_how_far_it_is_and_how_to_go_on(run, capsys, monkeypatch):
    stage = run / "training" / "stage2"
    for path in (stage / "step-12").rglob("*"):
        path.unlink() if path.is_file() else None
    for folder in ("step-12/model", "step-12/deepspeed", "step-12"):
        (stage / folder).rmdir()
    (stage / "latest").write_text("step-6\n")
    monkeypatch.setattr("sys.argv", ["verify", "--run", str(run)])
    main()
    said = capsys.readouterr().err
    assert (
        f"unfinished {stage}: 6 of 12 steps are done\n    `make train STAGE=stage2 RUN={run}` goes on with it" in said
    )
    assert "nothing is damaged, and what is unfinished goes on with the commands above" in said


def test_raw_shards_of_the_users_own_are_only_noted(run, tmp_path):
    shards = [tmp_path / f"photos_{number}.tar" for number in (0, 1)]
    for path in shards:
        path.write_bytes(bytes(10240))
        with open_ranges(str(path)) as file:
            HeaderCache(run).remember(str(path), read_tar_headers(str(path), file))
    remember_found(run, [str(path) for path in shards])
    assert require_sound(run).notes == []
    shards[0].unlink()
    shards[1].write_bytes(bytes(20480))
    first, second = require_sound(run).notes
    assert first == f"1 raw shards are not where they were found, such as {shards[0]}"
    assert second.startswith(f"1 raw shards have changed since their headers were read, such as {shards[1]}")


def test_damaged_lists_of_raw_shards_and_their_headers_are_named(run, tmp_path):
    shard = tmp_path / "photos_0.tar"
    shard.write_bytes(bytes(10240))
    with open_ranges(str(shard)) as file:
        HeaderCache(run).remember(str(shard), read_tar_headers(str(shard), file))
    remember_found(run, [str(shard)])
    (headers,) = (run / ".headers").iterdir()
    whole = headers.read_bytes()
    for data in (b"", whole[:-5], whole[:20], whole[:-9] + zlib.compress(b"no")):
        headers.write_bytes(data)
        (problem,) = verify_run(run).problems
        assert headers.name in str(problem) and problem.mend.endswith(COPY)
    headers.write_bytes(whole)
    (run / "shards.json").write_text("{")
    (problem,) = verify_run(run).problems
    assert "shards.json is damaged" in str(problem) and "give SHARDS" in problem.mend


def test_a_copy_of_a_remote_shard_is_compared_with_its_name(run):
    (copy,) = (run / "training" / "cache").glob("*/*")
    copy.write_bytes(b"other")
    (problem,) = verify_run(run).problems
    assert "is not the file whose SHA-256 its folder is called after" in str(problem) and COPY in problem.mend


def test_a_run_of_which_nothing_has_begun_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for run in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingFileError, match="nothing has finished here"):
            verify_run(run)


@pytest.mark.parametrize("columns", [80, 200])
def test_the_page_fits_a_terminal_and_shows_names_as_they_are(run, columns, capsys, monkeypatch):
    folder = run / "samples" / "[red]"
    write_samples(folder)
    cut(folder / "cat.png")
    monkeypatch.setattr("pipelines.engine.progress.console.width", columns)
    monkeypatch.setattr("sys.argv", ["verify", "--run", str(run)])
    with pytest.raises(SystemExit, match="1"):
        main()
    lines = capsys.readouterr().err.splitlines()
    table = [line for line in lines if line.startswith(("│", "┃"))]
    assert all(len(line) <= columns for line in table)
    assert any(re.match(r"│ samples/\[red\] +│ +6 │ +300 │ +0 │ +1 │", line) for line in table)
    assert any(f"bad {folder}, key cat: cat.png is a damaged PNG: it is cut short" in line for line in lines)
    assert any(re.search(r"^read \d+ files, \d+\.\d MB in 0:00:\d\d \(\d+ MB/s\); ", line) for line in lines)

"""The demo's commands on a tiny recipe, end to end: every stage, every plan, and a second time with nothing to do."""

import hashlib
import json
import os
import re
import stat
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sound_run import require_sound
from warm_python import run_module

from pipelines.store.verify import kinds
from pipelines.store.verify.findings import Findings
from pipelines.store.verify.folders import find_folders
from pipelines.store.verify.run import check_folders

TINY = (
    "toyworld.num_laion=24",
    "toyworld.num_sa=24",
    "toyworld.num_hq=12",
    "toyworld.num_imagenet=24",
    "toyworld.samples_per_shard=12",
    "toyworld.num_prompts=4",
    "toyworld.broken_fraction=0.1",
    "engine.in_process=true",
    "captioning.max_reject_fraction=0.5",
    "features.max_reject_fraction=0.5",
    "evaluation.max_reject_fraction=0.5",
    "training.num_processes=1",
    "training.global_batch_size=8",
    "training.stage1.num_steps=2",
    "training.stage2.num_steps=3",
    "training.stage3.num_steps=2",
    "sampling.num_steps=2",
    "sampling.classes=[0, 13]",
)
STAGES = [
    ("toyworld", "world"),
    ("captioning",),
    ("dataset_stats",),
    *((room, "--stage", stage) for stage in "123" for room in ("features", "training", "sampling")),
    ("toyworld", "judge"),
    ("sampling.evaluation", "score", "--stage", "2"),
    ("toyworld", "report"),
]


def command(run: Path, stage: tuple[str, ...], *more: str) -> str:
    room, *arguments = stage
    task = arguments[:1] if room in ("toyworld", "sampling.evaluation") else []
    overrides = [argument for pair in TINY for argument in ("--set", pair)]
    line = [*task, "--recipe", "recipes/toyworld.toml", "--run", str(run), *overrides]
    line += [*arguments[len(task) :], *more]
    result = run_module(room, line)
    assert result.returncode == 0, f"{stage}: {result.stderr}"
    return result.stderr + result.stdout


def digests(run: Path) -> dict[str, str]:
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    for stage in STAGES:
        # One plan of each room; that of sampling has tests of its own.
        command(folder, stage, "--plan") if stage[0] != "sampling" and stage[-1] not in ("1", "3") else None
        command(folder, stage)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_sample_is_accounted_for_from_shard_to_score(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    captions = summary["counts"]["captioning"]
    assert captions["read"] == 24 + 24 + 12
    assert captions["rejected"]["corrupt_image"] == captions["read"] - captions["kept"] > 0
    text = summary["counts"]["features"]["stage2"]["text"]
    assert text["read"] == 24 + 24
    assert text["rejected"] == {"caption:corrupt_image": captions["rejected"]["corrupt_image"]}
    assert summary["captioning"]["accuracy"] > 0.9
    raw, dense = summary["dataset_stats"]["LAION"], summary["dataset_stats"]["LAION-LLaVA"]
    assert dense["nouns_per_image"] > 2 * raw["nouns_per_image"]
    assert summary["judge"].keys() == {"stage1", "stage2", "stage3"}
    assert [summary["judge"][f"stage{stage}"]["num_images"] for stage in (1, 2, 3)] == [2, 4, 4]
    assert {"FD-LLaVA", "judge spatial"} <= summary["evaluation"]["stage2"].keys()
    assert "By make eval" in (run / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_sample_is_swapped_for_another(run: Path) -> None:
    """Keys of captions, text and latents are the same, shard by shard and in the same order."""
    for path in sorted((run / "captions").glob("laion_*.parquet")):
        keys = pq.read_table(path)["key"].to_pylist()
        for family in ("text", "latent-64"):
            assert pq.read_table(run / "features" / family / path.name)["key"].to_pylist() == keys


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_run_knows_where_its_shards_were_found(run: Path) -> None:
    shards = json.loads((run / "run.json").read_text())["found"]
    assert set(shards) == {path.stem for path in (run / "captions").glob("*.parquet")}
    assert all((run / path).is_file() and not Path(path).is_absolute() for path in shards.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whoever_the_umask_lets_may_read_and_write_its_files(run: Path) -> None:
    """Libraries make files for their owner alone, weights above all, where nobody looks."""
    umask = os.umask(0)
    os.umask(umask)
    odd = {
        str(path.relative_to(run)): oct(mode)
        for path in run.rglob("*")
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert odd == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_verify_finds_it_sound_and_knows_all_of_its_files(run: Path) -> None:
    """A file that a room writes and verify knows nothing of fails here: describe it in pipelines/store/verify/kinds."""
    findings = require_sound(run)
    assert findings.others == set()
    unchecked = {re.sub(r"events\..*", "events", path.name) for path in findings.unchecked}
    assert unchecked == {".lock", ".run.lock", ".summary.lock", "events"}
    found = {folder.kind for folder in find_folders(run)}
    assert found == {
        *(kinds.RUN, kinds.RAW, kinds.CAPTIONS, kinds.STATS, kinds.COUNTS, kinds.FEATURES, kinds.TRAINING),
        *(kinds.CHECKPOINT, kinds.SAMPLES, kinds.SEEN, kinds.LISTS, kinds.SCORES, kinds.JUDGE),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_time_changes_no_byte_and_says_so(run: Path) -> None:
    before = digests(run)
    for stage in STAGES:
        output = command(run, stage)
        assert "nothing to do" in output or stage[0] == "dataset_stats" or stage[-1] == "report", f"{stage}: {output}"
    assert digests(run) == before


def verify_folder(run: Path, name: str) -> Findings:
    return check_folders([folder for folder in find_folders(run) if folder.name == name])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kept_fraction", [0.5, 0.0], ids=["cut", "empty"])
def test_every_file_that_verify_looks_into_is_named_when_it_is_damaged(run: Path, kept_fraction: float) -> None:
    # The last test here: what is damaged is put back, with another time of change.
    for folder in find_folders(run):
        checked = verify_folder(run, folder.name).checked
        assert checked or not folder.files
        for path in sorted(checked):
            whole = path.read_bytes()
            path.write_bytes(whole[: int(len(whole) * kept_fraction)])
            findings = verify_folder(run, folder.name)
            said = [*(f"{problem} {problem.mend}" for problem in findings.problems), *findings.notes]
            # An empty log is a log.
            assert any(path.name in text for text in said) or (path.name, kept_fraction) == ("metrics.jsonl", 0.0), path
            path.write_bytes(whole)

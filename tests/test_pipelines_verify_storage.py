"""A disk that fails at one place of a run: `make verify` names that place, and checks all the rest."""

import errno
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from sound_run import require_sound
from test_pipelines_verify_kinds import write_run

from pipelines.command import run_command
from pipelines.store.files import sha256_file
from pipelines.store.verify.__main__ import main
from pipelines.store.verify.findings import SEE_TO_IT, Problem
from pipelines.store.verify.run import verify_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def failing(function: Callable[..., Any], places: Collection[Path], *, is_named: bool = True) -> Callable[..., Any]:
    def call(path: Any, *arguments: Any) -> Any:
        if Path(path) in places:
            raise OSError(errno.EIO, "Input/output error", *([str(path)] if is_named else []))
        return function(path, *arguments)

    return call


def problems(run: Path) -> list[str]:
    found: list[Problem] = verify_run(run).problems
    assert {problem.mend for problem in found} == {SEE_TO_IT}
    return [str(problem) for problem in found]


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_is_checked(run, monkeypatch) -> None:
    hidden = {run / "captions", run / "training" / "stage2" / "step-6"}
    monkeypatch.setattr(os, "scandir", failing(os.scandir, hidden))
    assert problems(run) == [
        f"{run}: captions cannot be read: Input/output error",
        f"{run / 'training' / 'stage2'}: step-6 cannot be read: Input/output error",
    ]


def test_a_run_that_cannot_be_listed_is_not_one_in_which_nothing_has_begun(run, monkeypatch) -> None:
    monkeypatch.setattr(os, "scandir", failing(os.scandir, {run}))
    assert problems(run) == [f"{run}: . cannot be read: Input/output error"]


@pytest.mark.parametrize("is_named", [True, False])
def test_a_manifest_a_marker_and_a_checkpoint_that_cannot_be_read_are_named(run, monkeypatch, is_named: bool) -> None:
    stage = run / "training" / "stage2"
    places = (
        *(run / "captions" / ".manifest.json", run / "judge" / ".done" / "stage2.json"),
        *(stage / "latest", stage / "step-12" / "trainer.json"),
    )
    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes, places, is_named=is_named))
    found = problems(run)
    assert set(found) >= {
        f"{run / 'captions'}: .manifest.json cannot be read: Input/output error",
        f"{run / 'judge'}, shard stage2: stage2.json cannot be read: Input/output error",
        f"{stage}: latest cannot be read: Input/output error",
        f"{stage / 'step-12'}: trainer.json cannot be read: Input/output error",
    }
    # Of a checkpoint, whether it has all its files is a check without files of its own.
    own = "trainer.json" if is_named else "step-12"
    assert len(found) == 5 and f"{stage / 'step-12'}: {own} cannot be read: Input/output error" in found


def test_a_shard_that_cannot_be_read_is_named(run, monkeypatch) -> None:
    shard = run / "captions" / "laion_0.parquet"
    monkeypatch.setattr("pipelines.store.verify.shards.sha256_file", failing(sha256_file, {shard}))
    assert problems(run) == [f"{run / 'captions'}, shard laion_0: laion_0.parquet cannot be read: Input/output error"]


def test_how_far_training_is_tells_the_checkpoint_in_force(run) -> None:
    stage = run / "training" / "stage2"
    (stage / "latest").write_text("step-6\n")
    (unfinished,) = require_sound(run, unfinished=["training/stage2"]).unfinished
    assert unfinished.text == "6 of 12 steps are done"


def test_a_summary_put_aside_is_ours_and_a_folder_called_like_a_conversion_is_not(run) -> None:
    (run / "summary-damaged-0123abcd.json").write_text("{")
    folder = run / "training" / "stage2" / "step-12"
    for name in ("deepspeed-universal", "deepspeed-mine"):
        (folder / name).mkdir()
        (folder / name / "x.pt").write_bytes(b"cut")
    findings = verify_run(run)
    (problem,) = findings.problems
    assert "deepspeed-universal/x.pt" in str(problem)
    assert problem.mend == f"`rm -r {folder}/deepspeed-universal`: it is made anew"
    assert findings.others == {folder / "deepspeed-mine" / "x.pt"}
    assert {path.name for path in findings.unchecked} == {"summary-damaged-0123abcd.json"}


def test_a_run_is_typed_as_in_all_rooms_and_advice_can_be_typed(tmp_path, monkeypatch, capsys) -> None:
    write_run(tmp_path / "my run")
    (tmp_path / "my run" / "index.html").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["verify", "--run", "~/my run"])
    with pytest.raises(SystemExit, match="1"):
        main()
    page = tmp_path / "my run" / "index.html"
    assert f"`rm '{page}'`, then `make report RUN='{tmp_path}/my run'`" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["verify", "--run", "s3://bucket/run"])
    assert run_command("verify", main) == 2
    assert "RUN s3://bucket/run is a URL" in capsys.readouterr().err

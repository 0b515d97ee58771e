"""What a test does at the end with the run that it has made: nothing of it may be damaged in `make verify`'s eyes."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.store.verify.findings import Findings
from pipelines.store.verify.run import verify_run


def require_sound(run: Path, *, unfinished: Sequence[str] = ()) -> Findings:
    """Verify a run; no file may be damaged, and just the folders `unfinished` below it have not finished."""
    findings = verify_run(run)
    assert [str(problem) for problem in findings.problems] == []
    assert [item.directory.relative_to(run).as_posix() for item in findings.unfinished] == list(unfinished)
    return findings

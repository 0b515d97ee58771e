"""What a test does at the end with the run that it has made: nothing of it may be damaged in `make verify`'s eyes."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.store.verify.findings import Findings
from pipelines.store.verify.folders import find_folders
from pipelines.store.verify.run import check_folders, verify_run


def require_sound(run: Path, *, unfinished: Sequence[str] = (), room: str | None = None) -> Findings:
    """Verify a run, or of one with made-up inputs only the folder of a `room` and those below it.

    No file may be damaged, and just the folders `unfinished` below the run have not finished.
    """
    if room is None:
        findings = verify_run(run)
    else:
        findings = check_folders([folder for folder in find_folders(run) if f"{folder.name}/".startswith(f"{room}/")])
        assert findings.rows
    assert [str(problem) for problem in findings.problems] == []
    assert [item.directory.relative_to(run).as_posix() for item in findings.unfinished] == list(unfinished)
    return findings

"""The judge as a rater: it fills a preference page (Figure 5) with votes, as people do with the arrow keys."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_bytes
from pipelines.store.manifest import ShardDirectory
from pipelines.store.state_files import read_state
from pipelines.store.tables import MEND_SHARD, read_table
from toyworld.paper.readings import num_right

log = get_logger("toyworld")

# As `make eval TASK=preference` writes them, and TASK=winrates reads them.
PAGE_NAME, KEY_NAME, VOTES_NAME = "preference.html", "preference-key.json", "votes-of-the-judge.csv"
COLUMNS = ("study", "rater", "question", "left", "right", "choice")
STUDY = re.compile(r'<script type="application/json" id="study">(.*?)</script>', re.DOTALL)
PAGE = {"task": "preference"}
RATER = "judge"
QUESTION = "alignment"  # the only one that the judge can answer


def preference_folders(run: Path) -> list[Path]:
    """Return the folders of a run's preference pages."""
    return sorted(path.parent for path in (run / "evaluation").glob(f"*-preference/{PAGE_NAME}"))


def vote(run: Path) -> list[Path]:
    """Write the judge's votes beside every preference page of a run, and return their files.

    Of a pair it prefers the picture with more objects right in all respects, or of as many right ones the one with
    fewer that nobody asked for; else it has no preference.

    Raises:
        MissingFileError: there is no page, or the judge has not scored the samples of one.
        UserError: a page asks what the judge cannot tell, or was not written by this house.
    """
    folders = preference_folders(run)
    if not folders:
        raise MissingFileError(f"{run} has no preference page: `{typed_command('eval', PAGE)}` writes it")
    return [_vote_on(run, folder) for folder in folders]


def _vote_on(run: Path, folder: Path) -> Path:
    key = read_state(
        folder / KEY_NAME, mend=f"`{typed_command('eval')}` writes it anew", keys=("codes", "checkpoints", "files")
    )
    study = _read_study(folder / PAGE_NAME)
    if study["questions"] != [QUESTION]:
        raise UserError(
            f"{folder / PAGE_NAME} asks {', '.join(study['questions'])}, and the judge knows of {QUESTION} alone: "
            f'evaluation.preference_questions = ["{QUESTION}"]'
        )
    scores = {title: _scores(run, Path(drawn["samples"]).name) for title, drawn in key["checkpoints"].items()}
    rows = []
    for pair in study["pairs"]:
        left, right = (scores[key["codes"][code]][key["files"][code]] for code in pair["codes"])
        choice = "tie" if left == right else "left" if left > right else "right"
        rows.append((study["study"], RATER, QUESTION, *pair["codes"], choice))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    path = folder / VOTES_NAME
    atomic_write_bytes(path, text.getvalue().encode())
    log.info(f"{path}: {len(rows):,} votes, {sum(row[-1] == 'tie' for row in rows):,} without a preference")
    return path


def _read_study(page: Path) -> dict[str, Any]:
    match = STUDY.search(page.read_text(encoding="utf-8"))
    if match is None:
        raise UserError(f"{page} holds no study: `{typed_command('eval', PAGE)}` writes it anew")
    return json.loads(match[1])


def _scores(run: Path, samples: str) -> dict[str, tuple[int, int]]:
    """What a picture is preferred by, by its file: objects that are all right, and fewer that nobody asked for."""
    path = ShardDirectory(run / "judge").file(samples, ".parquet")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: `{typed_command('judge')}` scores the samples first")
    rows = read_table(path, ["file", "objects", "num_extra"], mend=MEND_SHARD).to_pylist()
    return {row["file"]: (num_right(row["objects"]), -row["num_extra"]) for row in rows}

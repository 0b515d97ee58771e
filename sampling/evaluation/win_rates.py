"""Votes of the preference page to win rates: who was preferred how often, with Wilson's 95% interval."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError
from pipelines.command import Command
from pipelines.engine.progress import console, get_logger
from pipelines.store.files import atomic_write_bytes, atomic_write_json, one_at_a_time, own_files
from sampling.evaluation.distances import wilson_interval
from sampling.evaluation.preference import preference_folder, read_key

COLUMNS = ["study", "rater", "question", "left", "right", "choice"]
CHOICES = ("left", "right", "tie")
REPORT_NAME = "win-rates"

log = get_logger("evaluation")


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Votes of one question between two checkpoints; `rate` is the first one's share of those that are no ties.

    `low` and `high` bound it with 95% confidence if votes are independent, which those of one rater hardly are.
    """

    question: str
    first: str
    second: str
    num_first: int
    num_second: int
    num_ties: int
    num_raters: int
    rate: float | None
    low: float
    high: float


def find_votes(command: Command) -> tuple[dict[str, Any], list[Path]]:
    """Return the key of the page, and the CSV files that lie beside it.

    Raises:
        MissingFileError: there is no key, or no vote.
    """
    folder = preference_folder(command)
    key, files = read_key(folder), own_files(folder, re.compile(r"[^.].*\.csv", re.DOTALL))
    if not files:
        raise MissingFileError(f"{folder} holds no CSV of votes: put the downloaded files there")
    return key, files


def count_votes(command: Command) -> None:
    """Read the votes beside the page; write `win-rates.json` and `win-rates.md` there.

    Raises:
        MissingFileError: there is no key, or no vote.
        UserError: a file is no list of votes; names file and line.
    """
    folder = preference_folder(command)
    key, files = find_votes(command)
    votes, rejected = read_votes(files, key)
    rates = win_rates(votes, key)
    value = {
        "study": key["study"],
        "files": [path.name for path in files],
        "num_votes": len(votes),
        "rejected": rejected,
        "rates": [asdict(rate) for rate in rates],
        "checkpoints": key["checkpoints"],
    }
    text = render_rates(rates, num_votes=len(votes), rejected=rejected)
    with one_at_a_time(folder):
        atomic_write_json(folder / f"{REPORT_NAME}.json", value)
        atomic_write_bytes(folder / f"{REPORT_NAME}.md", text.encode())
    log.info(f"written to {folder}")
    console.print(text, soft_wrap=True)


def read_votes(files: Sequence[Path], key: Mapping[str, Any]) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Return the votes of this page, with checkpoints for codes, and counts of those left out by reason.

    `other_study`: the page was written anew since; `repeated`: a rater's second vote on a question of a pair.

    Raises:
        UserError: a file is no list of votes; names file and line.
    """
    votes: dict[tuple[str, ...], dict[str, str]] = {}
    rejected: Counter[str] = Counter()
    for path in files:
        for number, row in _rows(path):
            if row["study"] != key["study"]:
                rejected["other_study"] += 1
                continue
            codes = (row["left"], row["right"])
            is_known = row["choice"] in CHOICES and row["question"] in key["questions"]
            if not is_known or not key["codes"].keys() >= set(codes) or not row["rater"].strip():
                raise UserError(f"{path}:{number} is no vote of this page: {','.join(row.values())}")
            vote = row | {"left": key["codes"][codes[0]], "right": key["codes"][codes[1]]}
            place = (row["rater"].strip(), row["question"], *codes)
            if place in votes:
                rejected["repeated"] += 1
            else:
                votes[place] = vote
    return list(votes.values()), dict(rejected)


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise UserError(f"{path}:1 should be {','.join(COLUMNS)}, not {','.join(reader.fieldnames or [])}")
            rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file: {error}") from None
    for number, row in rows:
        if None in row or None in row.values():
            raise UserError(f"{path}:{number} has not {len(COLUMNS)} cells")
    return rows


def win_rates(votes: Sequence[Mapping[str, str]], key: Mapping[str, Any]) -> list[WinRate]:
    """Return one rate per question and pair of checkpoints, those without a vote too."""
    rates = []
    for question in key["questions"]:
        for first, second in itertools.combinations(key["checkpoints"], 2):
            cast = [
                vote
                for vote in votes
                if vote["question"] == question and {vote["left"], vote["right"]} == {first, second}
            ]
            winners = Counter(vote[vote["choice"]] if vote["choice"] != "tie" else "tie" for vote in cast)
            num_decided = winners[first] + winners[second]
            low, high = wilson_interval(winners[first], num_decided)
            rates.append(
                WinRate(
                    question=question,
                    first=first,
                    second=second,
                    num_first=winners[first],
                    num_second=winners[second],
                    num_ties=winners["tie"],
                    num_raters=len({vote["rater"].strip() for vote in cast}),
                    rate=winners[first] / num_decided if num_decided else None,
                    low=low,
                    high=high,
                )
            )
    return rates


def render_rates(rates: Sequence[WinRate], *, num_votes: int, rejected: Mapping[str, int]) -> str:
    """Return the rates as Markdown."""
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in rejected.items()) or "none"
    lines = [
        "# Preference",
        "",
        f"{num_votes:,} votes; left out: {left_out}. Shares are of votes without ties, with Wilson's 95% interval.",
        "",
        "| question | preferred | over | share | 95% | for | against | ties | raters |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for item in rates:
        share = "–" if item.rate is None else f"{item.rate:.1%}"
        lines.append(
            f"| {item.question} | {item.first} | {item.second} | {share} | {item.low:.1%} to {item.high:.1%} | "
            f"{item.num_first} | {item.num_second} | {item.num_ties} | {item.num_raters} |"
        )
    return "\n".join(lines) + "\n"

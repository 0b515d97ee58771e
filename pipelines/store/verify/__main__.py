"""`python -m pipelines.store.verify --run RUN`: check the files of a run, and say what was found."""

import argparse
import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pipelines.command import run_command, run_folder
from pipelines.engine.progress import clock, console
from pipelines.store.verify.findings import Findings
from pipelines.store.verify.run import MEGABYTE, verify_run

MAX_SHOWN = 20


def print_findings(run: Path, findings: Findings) -> None:
    """Print one line per directory, the notes, what is unfinished, and the first problems with what to do."""
    table = Table(title=f"verify, {run}", title_justify="left")
    for heading in ("directory", "files", "kept", "rejected", "bad"):
        table.add_column(heading, justify="left" if heading == "directory" else "right")
    for row in findings.rows:
        num_bad = sum(problem.directory == row.directory for problem in findings.problems)
        numbers = (row.num_kept, row.num_rejected)
        cells = [f"{row.num_files:,}", *("–" if number is None else f"{number:,}" for number in numbers)]
        place = row.directory.relative_to(run).as_posix()
        table.add_row(place, *cells, Text(f"{num_bad:,}", style="bold red" if num_bad else ""))
    console.print(table)
    for note in findings.notes:
        console.print(note, soft_wrap=True)
    for item in findings.unfinished:
        console.print(Text.assemble(("unfinished", "bold yellow"), f" {item}"), soft_wrap=True)
        console.print(f"    `{item.command}` goes on with it", soft_wrap=True)
    for problem in findings.problems[:MAX_SHOWN]:
        console.print(Text.assemble(("bad", "bold red"), f" {problem}"), soft_wrap=True)
        if problem.mend:
            console.print(f"    {problem.mend}", soft_wrap=True)
    if len(findings.problems) > MAX_SHOWN:
        console.print(f"and {len(findings.problems) - MAX_SHOWN:,} more")
    megabytes = findings.num_bytes / MEGABYTE
    rate = megabytes / max(findings.seconds, 1e-6)
    counts = f"{len(findings.checked):,} files, {megabytes:,.1f} MB in {clock(findings.seconds)} ({rate:,.0f} MB/s)"
    rest = f"{len(findings.unchecked):,} files hold nothing to check, such as locks"
    console.print(f"read {counts}; {rest}", soft_wrap=True)


def main() -> None:
    """Verify a run and print what was found; the exit status is 1 if anything is damaged, not if it is unfinished."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.store.verify", description="Check the files of a run.")
    parser.add_argument("--run", required=True, help="folder of the run")
    run = run_folder(parser.parse_args().run)
    findings = verify_run(run)
    print_findings(run, findings)
    if findings.problems:
        sys.exit(1)
    if findings.unfinished:
        console.print("nothing is damaged, and what is unfinished goes on with the commands above")
        return
    console.print("every file is as it was written, and every sample is accounted for")


if __name__ == "__main__":
    sys.exit(run_command("verify", main))

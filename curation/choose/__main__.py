"""`python -m curation.choose --recipe R --run RUN [--stage S] [--plan]`: columns to a choice, or to a page of it."""

import sys

from curation.choose.page import write_page
from curation.choose.survey import Survey
from curation.choose.tables import ChoosingTable, choosing_tables
from pipelines.as_typed import typed_flag
from pipelines.columns.choice_counts import describe_counts
from pipelines.columns.choices import require_some
from pipelines.columns.written_choices import write_choice
from pipelines.command import Command, parse_command, run_command
from pipelines.engine.progress import get_logger
from pipelines.raw.shard_names import shard_name

log = get_logger("choose")


def main() -> None:
    """Write the choice of a table of features, or of all that choose; with a plan the page that shows it instead."""
    command = parse_command(
        "curation.choose",
        "Columns to which samples are trained on.",
        has_stages=True,
        stage_table="features",
        is_stage_optional=True,
    )
    tables = choosing_tables(command)
    for table in tables:
        # What is wrong with any of them is said before hours are spent on another.
        table.choice.check(_shards(table))
    for table in tables:
        if command.is_plan:
            _show(table, command)
        else:
            write_choice(table.choice, _shards(table))
    if not command.is_plan:
        # What keeps nothing was refused.
        command.remember()


def _show(table: ChoosingTable, command: Command) -> None:
    survey = Survey(table, _shards(table))
    path = write_page(survey, command)
    name = table.settings.table
    for line in describe_counts(survey.total):
        log.info(f"{name}: {line}")
    log.info(f"{name}: look at it in {path}")
    # Of a choice that nothing can be trained by the page tells why.
    require_some([survey.total], table.choice)
    log.info(f"{name}: the same command without {typed_flag('plan', True)} writes the choice")


def _shards(table: ChoosingTable) -> list[str]:
    return sorted(shard_name(path) for path in table.paths)


if __name__ == "__main__":
    sys.exit(run_command("choose", main))

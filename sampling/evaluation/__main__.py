"""`python -m sampling.evaluation TASK --recipe R --run RUN --stage S [--set key=value]`; TASK is one of `TASKS`."""

import argparse
import sys
from collections.abc import Callable, Sequence

from pipelines.command import Command, parse_command, run_command
from pipelines.engine.progress import get_logger

log = get_logger("evaluation")


def main(argv: Sequence[str] | None = None) -> None:
    """Do one of the evaluation's tasks."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = "\n".join(f"  {name}  {description}" for name, (description, _) in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m sampling.evaluation",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Scores of checkpoints.\n\n{names}",
        usage="%(prog)s TASK --recipe R --run RUN --stage S [--set key=value] [--plan]",
    )
    parser.add_argument("task", choices=TASKS)
    task = parser.parse_args(arguments[:1]).task
    description, run_task = TASKS[task]
    command = parse_command(f"sampling.evaluation {task}", description, argv=arguments[1:], has_stages=True)
    run_task(command)
    if not command.is_plan:
        command.remember()


def _score(command: Command) -> None:
    from sampling.evaluation.scores import describe_score, score

    if command.is_plan:
        for line in describe_score(command):
            log.info(line)
        return
    score(command)


def _curve(command: Command) -> None:
    from sampling.evaluation.curve import describe_curve, draw_curve

    if command.is_plan:
        for line in describe_curve(command):
            log.info(line)
        return
    draw_curve(command)


def _questions(command: Command) -> None:
    from sampling.evaluation.questions.report import describe_questions, score_questions

    if command.is_plan:
        for line in describe_questions(command):
            log.info(line)
        return
    score_questions(command)


def _preference(command: Command) -> None:
    from sampling.evaluation.preference import describe_page, write_page

    if command.is_plan:
        for line in describe_page(command):
            log.info(line)
        return
    write_page(command)


def _winrates(command: Command) -> None:
    from sampling.evaluation.win_rates import count_votes, find_votes

    if command.is_plan:
        _, files = find_votes(command)
        log.info(f"would count the votes of {', '.join(path.name for path in files)}")
        return
    count_votes(command)


TASKS: dict[str, tuple[str, Callable[[Command], None]]] = {
    "score": ("A table of checkpoints: distances, CLIP score, a judge's axes", _score),
    "curve": ("FID against CLIP score over guidance scales, as CSV and plot (Figure 20)", _curve),
    "questions": ("GenEval, T2I-CompBench, DPG-Bench or own questions, asked of a chat server", _questions),
    "preference": ("A blind page to compare checkpoints side by side (Figure 5)", _preference),
    "winrates": ("Votes of that page to win rates with confidence intervals", _winrates),
}

if __name__ == "__main__":
    sys.exit(run_command("evaluation", main))

"""`python -m toyworld TASK --recipe R --run RUN [--set key=value] [--plan]`; TASK is one of `TASKS`."""

import argparse
import sys
from collections.abc import Callable, Sequence

from pipelines.command import Command, parse_command, run_command
from pipelines.engine.progress import get_logger
from pipelines.store.summary import read_summary
from toyworld.config import ToyworldConfig

log = get_logger("toyworld")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the task that the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m toyworld", description="The toy world: draw it, score it, show it")
    parser.add_argument("task", choices=TASKS, help="; ".join(f"{name}: {text}" for name, (text, _) in TASKS.items()))
    name = parser.parse_args(arguments[:1]).task
    description, task = TASKS[name]
    command = parse_command(f"toyworld {name}", description, argv=arguments[1:])
    task(command)
    if not command.is_plan:
        command.remember()


def _world(command: Command) -> None:
    from toyworld.world import plan_world, write_world

    config = command.recipe.table("toyworld", ToyworldConfig)
    if command.is_plan:
        shards = plan_world(config)
        num_images = sum(shard.stop - shard.start for shard in shards)
        log.info(f"would write {num_images:,} images in {len(shards)} shards, and {config.num_prompts} prompts")
        return
    write_world(config, command.run)


def _judge(command: Command) -> None:
    from toyworld.asked import score_agreement, write_questions
    from toyworld.curation import score_curation
    from toyworld.few_steps import score_few_steps
    from toyworld.scoring import sample_folders, score_run

    config = command.recipe.table("toyworld", ToyworldConfig)
    if command.is_plan:
        names = ", ".join(folder.name for folder in sample_folders(command.run)) or "none yet"
        log.info(f"would score the captions of {command.run}, and the samples of: {names}")
        return
    score_run(config, command.run)
    write_questions(command.run)
    score_agreement(config, command.run)
    judged = read_summary(command.run).get("judge", {})
    score_few_steps(command.run, judged)
    score_curation(command.run, judged)


def _subject(command: Command) -> None:
    from toyworld.subject import write_subject

    config = command.recipe.table("toyworld", ToyworldConfig)
    if command.is_plan:
        log.info(
            f"would write {config.num_subject_images} images of the subject, and prompts, to {command.run / 'raw'}"
        )
        return
    write_subject(
        command.run,
        seed=config.seed,
        num_images=config.num_subject_images,
        num_prompts=config.num_subject_prompts,
        num_others=config.num_other_prompts,
        num_prior=config.num_prior_prompts,
    )


def _detect(command: Command) -> None:
    from toyworld.subject_scoring import score_subject, subject_folders

    folders = subject_folders(command.run)
    if command.is_plan:
        log.info(f"would score the subject in: {', '.join(map(str, folders.values()))}")
        return
    score_subject(folders, command.run)


def _edges(command: Command) -> None:
    from toyworld.edges import write_edges

    config = command.recipe.table("toyworld", ToyworldConfig)
    if command.is_plan:
        log.info(
            f"would write {config.num_edges_images:,} images, and edges of {config.num_edges_prompts} other scenes, to "
            f"{command.run / 'raw'}"
        )
        return
    write_edges(command.run, seed=config.seed, num_images=config.num_edges_images, num_prompts=config.num_edges_prompts)


def _follow(command: Command) -> None:
    from toyworld.edges_scoring import edges_folders, score_edges

    folders = edges_folders(command.run)
    if command.is_plan:
        log.info(f"would score how edges are followed in: {', '.join(map(str, folders.values()))}")
        return
    score_edges(folders, command.run)


def _spoil(command: Command) -> None:
    from toyworld.spoilt import write_spoilt

    config = command.recipe.table("toyworld", ToyworldConfig)
    if command.is_plan:
        log.info(
            f"would write {config.num_spoilt_images:,} images with captions, some of them spoilt, and "
            f"{config.num_prompts} prompts, to {command.run / 'raw'}"
        )
        return
    write_spoilt(config, command.run)


def _vote(command: Command) -> None:
    from toyworld.paper.votes import preference_folders, vote

    if command.is_plan:
        log.info(f"would vote on: {', '.join(map(str, preference_folders(command.run))) or 'no page yet'}")
        return
    vote(command.run)


def _paper_page(command: Command) -> None:
    from toyworld.paper.page import PAGE_NAME, write_page

    if command.is_plan:
        log.info(f"would write {command.run / PAGE_NAME}")
        return
    write_page(command.run)


def _report(command: Command) -> None:
    from toyworld.report import write_report

    if command.is_plan:
        log.info(f"would write {command.run / 'index.html'}")
        return
    write_report(command.recipe, command.run)


TASKS: dict[str, tuple[str, Callable[[Command], None]]] = {
    "world": ("Write the raw shards of the toy world, their truth and unseen prompts", _world),
    "judge": ("Score captions and samples against the scenes they belong to", _judge),
    "subject": ("Write images of a subject that the world does not have, and prompts, for DreamBooth", _subject),
    "detect": ("Score how well the subject was learnt, and what was lost by it", _detect),
    "edges": ("Write images, and edges of other scenes with prompts of colours, for a control branch", _edges),
    "follow": ("Score how the edges are followed, and the prompts", _follow),
    "spoil": ("Write images with captions, some of them spoilt in known ways, to try a choice on", _spoil),
    "vote": ("Fill the run's preference pages with the judge's votes", _vote),
    "paper-page": ("Write the page of the paper's claims, from the runs of its parts", _paper_page),
    "report": ("Write the run's page, index.html, from whatever stages have finished", _report),
}

if __name__ == "__main__":
    sys.exit(run_command("toyworld", main))

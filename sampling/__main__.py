"""`python -m sampling --recipe R --run RUN --stage 1|2|3 [--set key=value] [--plan]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.command import parse_command, run_command
from pipelines.progress import get_logger
from sampling.checkpoints import open_run_checkpoint, open_transformer_folder
from sampling.config import STAGES, SamplingConfig, encoder_config
from sampling.generate import describe_job, make_job, run_job

log = get_logger("sampling")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the samples of one training stage's checkpoint."""
    command = parse_command("sampling", "Checkpoint and prompts to images", argv=argv, stages=STAGES)
    config = command.recipe.table("sampling", SamplingConfig)
    if config.checkpoint is None:
        checkpoint = open_run_checkpoint(command.run, command.stage_name)
    else:
        checkpoint = open_transformer_folder(Path(config.checkpoint), encoder_config(command.recipe))
    name = command.stage_name if config.prompt is None else f"{command.stage_name}-prompt"
    job = make_job(config, checkpoint, run=command.run, name=name)
    if command.is_plan:
        for line in describe_job(job):
            log.info(line)
        return
    run_job(job, run=command.run)


if __name__ == "__main__":
    sys.exit(run_command("sampling", main))

"""`python -m sampling --recipe R --run RUN --stage S [--set key=value] [--plan]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from encoders.devices import require_device
from errors import UserError, memory_for
from pipelines.as_typed import typed_path
from pipelines.command import parse_command, run_command
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig
from sampling.config import SamplingConfig, sampling_config
from sampling.generate import SamplingJob, check_inputs, check_job, describe_job, make_job, memory_settings, run_job
from sampling.opening import find_trained_model

log = get_logger("sampling")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the samples of one training stage's checkpoint, or only encode their prompts."""
    command = parse_command("sampling", "Checkpoint and prompts to images", argv=argv, has_stages=True)
    config = sampling_config(command)
    if config.write_embeddings is not None and config.text_encoder == "precomputed":
        # What is written is encoded now, wherever drawing will read its embeddings from.
        config = config.model_copy(update={"text_encoder": "device"})
    job = make_job(
        config,
        find_trained_model(config, command),
        run=command.run,
        name=command.stage_name if config.prompt is None else f"{command.stage_name}-prompt",
        engine=command.recipe.table("engine", EngineConfig),
    )
    if config.write_embeddings is not None:
        path = typed_path(config.write_embeddings.replace("{run}", str(command.run)))
        if not command.is_plan:
            command.remember()
        _write_embeddings(job, path, is_plan=command.is_plan)
        return
    lost = check_job(job)
    if command.is_plan:
        for line in [*describe_job(job), *_describe_memory(job, config)]:
            log.info(line)
    else:
        command.remember()
        run_job(job, run=command.run, lost=lost)


def _describe_memory(job: SamplingJob, config: SamplingConfig) -> list[str]:
    if not job.pending():
        return []
    from sampling.card import describe_memory  # which imports torch

    return describe_memory(job, config)


def _write_embeddings(job: SamplingJob, path: Path, *, is_plan: bool) -> None:
    from sampling.text_encoding import write_embeddings

    if job.trained.text is None:
        raise UserError(f"sampling.write_embeddings is set, but {job.trained.name} knows classes, not text")
    require_device(job.config.device, key="sampling.device")
    check_inputs(job)
    if is_plan:
        log.info(f"would encode the prompts of {len(job.requests):,} images into {path}, and draw nothing")
        return
    with memory_for(f"embeddings of the prompts for {path}", memory_settings(job)):
        num_prompts = write_embeddings(path, job.requests, job.config, job.trained.text)
    log.info(f"{path}: embeddings of {num_prompts:,} prompts; read them with sampling.text_encoder=precomputed")


if __name__ == "__main__":
    sys.exit(run_command("sampling", main))

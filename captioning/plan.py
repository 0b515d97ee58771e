"""What captioning a run would take: shards, samples, prompts and bytes, without loading a model."""

from rich.table import Table
from rich.text import Text

from captioning.architectures import read_architecture, require_fit
from captioning.job import CaptioningJob, vllm_gpus
from captioning.prompts import DEFAULT, template_for
from pipelines.engine.progress import console

# Captions at a time where `captioning.batch_size` is 0, by engine.
OPEN_BATCH = {
    "transformers": "32 on a CPU, as many as fit a GPU",
    "generate": "32 or as many as fit",
    "vllm": "as many as vLLM holds",
}
# A row with a caption of about 100 words, compressed.
BYTES_PER_ROW = 450


def print_plan(job: CaptioningJob) -> None:
    """Print shards, samples, prompts and estimated sizes."""
    pending = job.pending()
    table = Table(title=f"Captions of {len(job.sources)} shards into {job.output.path}")
    for column in ("prompt", "shards", "samples", "to do", "about"):
        table.add_column(column, justify="left" if column == "prompt" else "right")
    names = {source.name for source in pending}
    for template, counts in _by_prompt(job).items():
        todo, total = sum(counts[name] for name in counts.keys() & names), sum(counts.values())
        size = f"{todo * BYTES_PER_ROW / 1e6:,.1f} MB"
        table.add_row(Text(template), f"{len(counts):,}", f"{total:,}", f"{todo:,}", size)
    console.print(table)
    if completed := job.to_complete():
        console.print(f"{len(completed)} of the shards done keep their captions: rejects, limits or CLIP scores change")
    for change in job.changed_settings():
        line = f"{job.output.path} was made with other settings and would be captioned anew: {change}"
        console.print(line, markup=False, soft_wrap=True)
    if job.config.is_given:
        _print_given(job)
    else:
        _print_engine(job)


def _print_given(job: CaptioningJob) -> None:
    console.print("engine   given: no model; prompts and decoding of the recipe are not used")
    for source in job.given:
        console.print(f"column   {source.describe()}", markup=False, soft_wrap=True)


def _print_engine(job: CaptioningJob) -> None:
    config = job.config
    decoding = "greedy" if config.temperature == 0 else f"temperature {config.temperature}, seed {config.seed}"
    place = f", at {config.server.base_url}" if config.engine == "openai" else ""
    console.print(f"model    {config.model} ({job.model.identity}){place}", soft_wrap=True)
    console.print(f"engine   {config.engine}, {_describe_engine(job)}", markup=False, soft_wrap=True)
    at_a_time = (
        config.server.num_requests if config.engine == "openai" else config.batch_size or OPEN_BATCH[config.engine]
    )
    console.print(f"decoding {decoding}, at most {config.max_new_tokens} tokens, {at_a_time} captions at a time")
    console.print(f"prompts  sha256 {config.prompts_sha256}")


def _describe_engine(job: CaptioningJob) -> str:
    """Return what captions: a server, or a class of transformers and how it decodes.

    Raises:
        UserError: the engine of the recipe does not take the model.
    """
    if job.config.engine == "openai":
        return "a chat server"
    architecture = read_architecture(job.model)
    if job.config.engine == "vllm":
        name = "a model whose files are not here yet" if architecture is None else f"a {architecture.name}"
        num_gpus = vllm_gpus(job.config)
        return f"{name}, by vLLM in each worker, {num_gpus or 'no'} {'GPU' if num_gpus == 1 else 'GPUs'} a worker"
    name = "whose files are not here yet" if architecture is None else f"a {architecture.name}"
    if job.config.engine == "generate":
        return f"{name}, on batches of prompts of about one length"
    if architecture is not None:
        require_fit(architecture, job.config.model)
    return f"{name}, with continuous batching"


def _by_prompt(job: CaptioningJob) -> dict[str, dict[str, int]]:
    """Return, by prompt, how many samples of which shards are asked it, as far as headers tell."""
    groups: dict[str, dict[str, int]] = {}
    if job.config.is_given:
        return {"none, captions are given": {source.name: source.num_samples for source in job.sources}}
    for source in job.sources:
        template = template_for(source.name, job.config.prompts)
        asked_with_text = source.num_samples
        if "{alt_text}" in template:
            asked_with_text = job.num_texts[source.name]
            if asked_with_text < source.num_samples:
                groups.setdefault(job.config.prompts[DEFAULT], {})[source.name] = source.num_samples - asked_with_text
        if asked_with_text:
            groups.setdefault(template, {})[source.name] = asked_with_text
    return groups

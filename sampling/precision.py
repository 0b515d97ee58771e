"""What `auto` of `sampling.dtype` and `sampling.vae_dtype` is: of a folder that was begun what it was begun in.

Otherwise it is a matter of the machine that draws. So no folder has images of two kinds of machines, and what was drawn
on a GPU is known where there is none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.engine.run import EngineConfig
from pipelines.store.manifest import Fingerprint, ShardDirectory
from sampling.config import ON_A_CPU, ON_A_GPU, SamplingConfig
from sampling.images import is_written
from sampling.requests import ImageRequest

# What the fingerprint had before defaults were left out of it. Keys that came later have no place here.
WRITTEN_OUT = ("solver", "num_steps", "guidance_scale", "negative_prompt", "dtype", "text_dtype")


@dataclass(frozen=True, kw_only=True)
class Settled:
    """Settings in which nothing is left to the machine, and the fingerprint of what they draw.

    `note` says that images go on in other dtypes than they would be begun in here.
    """

    config: SamplingConfig
    fingerprint: Fingerprint
    note: str | None = None


def settle(
    config: SamplingConfig,
    inputs: Mapping[str, Any],
    *,
    directory: ShardDirectory,
    requests: Sequence[ImageRequest],
    engine: EngineConfig,
) -> Settled:
    """Settle the dtypes of a folder of samples; `inputs` are what decides images beside the settings."""
    on_a_cpu, on_a_gpu = (_form(config, inputs, values, directory) for values in (ON_A_CPU, ON_A_GPU))
    if on_a_cpu.fingerprint == on_a_gpu.fingerprint:
        return on_a_cpu
    begun = _find_begun((on_a_cpu, on_a_gpu), directory, requests)
    if begun is not None and all(is_written(directory.path, item, fingerprint=begun.fingerprint) for item in requests):
        return begun
    here = on_a_gpu if _is_drawn_on_a_gpu(config, engine, num_images=len(requests)) else on_a_cpu
    if begun is None or begun is here:
        return here
    # Earlier versions did not write down where they drew, and what they left counts as a CPU's.
    begun_on, vae = "a CPU or by an earlier version" if begun is on_a_cpu else "a GPU", begun.config.vae_dtype
    note = (
        f"{directory.path} was begun on {begun_on} and goes on as there, in {begun.config.dtype} with the VAE in "
        f"{'bfloat16 if a test picture holds' if vae == 'tested' else vae}; sampling.dtype and sampling.vae_dtype "
        "choose others, and all is drawn anew"
    )
    return Settled(config=begun.config, fingerprint=begun.fingerprint, note=note)


def _form(
    config: SamplingConfig, inputs: Mapping[str, Any], values: Mapping[str, str], directory: ShardDirectory
) -> Settled:
    """Return the settings with `auto` as `values` have it.

    The fingerprint leaves out what a CPU has, as it was before a GPU's was told from it: what was drawn on a CPU stays
    known.
    """
    found = {name: value for name, value in values.items() if getattr(config, name) == "auto"}
    told = {name: value for name, value in found.items() if value != ON_A_CPU[name]}
    defaults = config.fingerprint_defaults()
    fingerprint = directory.known_as(
        Fingerprint.of({**inputs, **config.fingerprint_fields(), **told}),
        defaults={name: defaults[name] for name in WRITTEN_OUT},
    )
    return Settled(config=config.model_copy(update=found), fingerprint=fingerprint)


def _find_begun(
    forms: Sequence[Settled], directory: ShardDirectory, requests: Sequence[ImageRequest]
) -> Settled | None:
    """Return the form of the first image that is there."""
    for request in requests:
        for form in forms:
            if is_written(directory.path, request, fingerprint=form.fingerprint):
                return form
    return None


def _is_drawn_on_a_gpu(config: SamplingConfig, engine: EngineConfig, *, num_images: int) -> bool:
    """Whether this command would draw so many images on a GPU, of this machine or of Ray's workers."""
    if config.device != "auto":
        return config.device == "cuda"
    if engine.gpus_per_worker and not engine.is_in_process(num_images, config.max_images_in_process):
        return True
    import torch

    return torch.cuda.is_available()

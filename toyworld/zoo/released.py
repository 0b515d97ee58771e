"""The embedded text-to-image PixArt, for fine-tuning: the EMA weights of `make demo-paper`, stage 2, in half the bytes.

So it has seen the captions that the embedded LLaVA writes of 5,000 pictures, and no truth. It stands where people have
a released checkpoint.
"""

from pathlib import Path

from errors import MissingFileError
from pipelines.engine.progress import get_logger
from pipelines.store.checkpoints import MODEL, find_checkpoint
from pipelines.store.files import atomic_write_json
from pixart.convert import load_diffusers, save_diffusers
from pixart.evidence import origins_of_folder
from pixart.origins import ORIGINS_FILE

STAGE = "stage2"

log = get_logger("toyworld.zoo")


def release(run: Path, folder: Path) -> None:
    """Write stage 2 of a run to `folder` as fp16, in diffusers' layout, and what it was trained with.

    Raises:
        MissingFileError: the run has no such stage yet.
    """
    checkpoint = find_checkpoint(run / "training" / STAGE)
    if checkpoint is None:
        raise MissingFileError(f"{run}/training/{STAGE} has no checkpoint yet: type `make demo-paper` first")
    weights = checkpoint.path / MODEL
    save_diffusers(load_diffusers(weights).half(), folder)
    atomic_write_json(folder / ORIGINS_FILE, origins_of_folder(weights).to_json())
    log.info(f"{folder}: {STAGE} of {run}, step {checkpoint.step}")

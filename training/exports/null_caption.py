"""The null caption that original code guides with, from the features that a stage was trained with."""

# L rows, D text width

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.store.checkpoints import open_checkpoint
from pipelines.store.families import NULL_CAPTION_FILE
from pipelines.store.manifest import MANIFEST_NAME, read_manifest
from pixart.origins import Origins


def known_null_caption(checkpoint: Path, origins: Origins, *, width: int) -> Tensor | None:
    """Return the null caption fp32 [L, D] that an original file of a checkpoint holds; None where it is not known.

    It is what the text encoder gives for no text, in each of the L = `max_tokens` rows: original code lets as many of
    them be attended as the prompt has tokens, and equal ones are attended as the one that was trained with.
    """
    text, features = open_checkpoint(checkpoint).trainer["text"], checkpoint.absolute().parents[2] / "features"
    folders = (path.parent for path in sorted(features.glob(f"text*/{MANIFEST_NAME}")))
    path = next((folder for folder in folders if read_manifest(folder).extra.get("text") == text), None)
    if path is None or not (path / NULL_CAPTION_FILE).is_file():
        return None
    (stored,) = load_file(path / NULL_CAPTION_FILE).values()
    if stored.dtype == torch.uint16:  # bfloat16, as features are stored
        stored = stored.view(torch.bfloat16)
    if origins.max_tokens is None or len(stored) != 1 or stored.shape[1] != width:
        return None
    return stored.float().expand(origins.max_tokens.value, -1).contiguous()

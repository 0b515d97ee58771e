"""The embeddings of a stage's preview prompts: encoded once, by a process of its own, and kept in the stage's folder.

So nothing of a text encoder is in memory while the stage trains, and a resume does not need it. The process is
`python -m training.previews.texts`, which takes an `EncodingTask` as JSON from stdin and says on stdout what a user can
mend.
"""

# L text tokens, D text width

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.text import DEFAULT_CLEANING
from errors import MissingFileError, ProgramFault, UserError, users_message
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_file, remove_temporary_files, sha256_text
from pipelines.store.previews import FOLDER
from pipelines.store.weight_files import weight_file_damage
from training.data.feature_tables import FeatureTable
from training.stages.stage import TrainingJob

if TYPE_CHECKING:
    from torch import Tensor

log = get_logger("training")

EMBEDDINGS = f"{FOLDER}/prompts.safetensors"
IDENTITY = "identity"
# What identifies a text encoder and what it reads.
ENCODER_FACTS = ("model", "revision", "max_tokens", "cleaning", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class EncodingTask:
    """Prompts to encode, the null caption first, the encoder of the features (`text`), and where they go."""

    prompts: list[str]
    text: dict[str, Any]
    dtype: str
    device: str
    path: str
    key: str

    @property
    def identity(self) -> str:
        """What the embeddings follow from."""
        return sha256_text(json.dumps([self.prompts, self.text, self.dtype], sort_keys=True))


def encoding_task(job: TrainingJob) -> EncodingTask:
    """Return what is to be encoded for a stage that draws prompts: as the features' captions were."""
    text = job.features.text_encoder
    assert text is not None, "the features of a PixArt have text"
    table = job.command.recipe.laid_over("features", job.features.table_name, keys=FeatureTable.model_fields)
    return EncodingTask(
        prompts=["", *job.settings.preview_prompts],
        text={name: text[name] for name in ENCODER_FACTS if name in text},
        dtype=table.get("text_dtype", "bfloat16"),
        device=table.get("device", "auto"),
        path=str(job.directory / EMBEDDINGS),
        key=f"training.{job.command.stage_name}.preview_prompts: text encoder of the features",
    )


def is_encoded(job: TrainingJob) -> bool:
    """Whether the embeddings of a stage's prompts are there, whole."""
    task = encoding_task(job)
    return weight_file_damage(Path(task.path)) is None and _identity(Path(task.path)) == task.identity


def encode_prompts(job: TrainingJob) -> None:
    """Encode the prompts of a stage, unless that has been done; the encoder's memory is free again behind it.

    Raises:
        UserError: the encoder is not there or cannot be loaded, or the memory does not suffice for it.
    """
    if is_encoded(job):
        return
    task = encoding_task(job)
    log.info(f"encoding {len(task.prompts) - 1:,} prompts of previews with {task.text['model']}")
    command = [sys.executable, "-m", "training.previews.texts"]
    done = subprocess.run(command, input=json.dumps(dataclasses.asdict(task)), stdout=subprocess.PIPE, text=True)
    if done.returncode == 2:
        raise UserError(done.stdout.strip())
    if done.returncode == -signal.SIGKILL:
        raise UserError(f"{task.key} was ended by SIGKILL; the machine may be out of memory")
    if done.returncode:
        raise ProgramFault(f"encoding the prompts of previews ended with status {done.returncode}")


def read_embeddings(job: TrainingJob) -> list[Tensor]:
    """Return the embeddings [L, D] of the null caption and of each prompt, in order, on the CPU.

    Raises:
        MissingFileError: they have not been made, which the launcher does.
    """
    from safetensors import safe_open

    task = encoding_task(job)
    if not is_encoded(job):
        raise MissingFileError(
            f"{task.path} is not there, or of other prompts than {task.key.partition(':')[0]} has: "
            "`python -m training` makes it before it starts the ranks; torchrun does not"
        )
    with safe_open(task.path, framework="pt") as file:
        return [file.get_tensor(str(number)) for number in range(len(task.prompts))]


def _identity(path: Path) -> str | None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return (file.metadata() or {}).get(IDENTITY)


def encode(task: EncodingTask) -> None:
    """Encode a task's prompts into its file.

    Raises:
        UserError: the encoder cannot be loaded, or an embedding is not finite.
    """
    from safetensors.torch import save_file

    from encoders.devices import choose_device
    from encoders.opening import open_text_encoder

    encoder = open_text_encoder(
        task.text["model"],
        task.text["revision"],
        max_tokens=task.text["max_tokens"],
        cleaning=task.text.get("cleaning", DEFAULT_CLEANING),
        device=choose_device(task.device, key="features.device"),
        dtype=task.dtype,
        is_8bit=task.text.get("weight_dtype") == "int8",
        tokenizer=task.text.get("tokenizer"),
        key=task.key,
    )
    embeddings = encoder.encode(task.prompts)
    _require_finite(task, embeddings)
    path = Path(task.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(path.parent, path.name)
    # Names of tensors are numbers, as safetensors keeps one name for itself.
    tensors = {str(number): embedding.contiguous() for number, embedding in enumerate(embeddings)}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={IDENTITY: task.identity})


def _require_finite(task: EncodingTask, embeddings: Sequence[Tensor]) -> None:
    for prompt, embedding in zip(task.prompts, embeddings, strict=True):
        if not embedding.isfinite().all():
            raise UserError(
                f"{task.key} {task.text['model']} gives no finite embedding of {prompt[:80]!r}: its weights are at "
                "fault, put them there anew, or set features.text_dtype = 'float32'"
            )


def main() -> int:
    """Encode the task on stdin; returns the exit status, 2 with a message on stdout for what a user can mend."""
    try:
        encode(EncodingTask(**json.load(sys.stdin)))
    except Exception as error:
        message = users_message(error)
        if message is None:
            raise
        sys.stdout.write(f"{message}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The files of DeepSpeed's state in a checkpoint, and of what it is converted to beside it: which there must be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.store.files import atomic_write_json
from pipelines.store.state_files import read_state, state_damage
from pipelines.store.weight_files import weight_file_damage

STATE = "deepspeed"
# Made of `deepspeed/` for other ranks, and for today's layers.
UNIVERSAL_STATE = "deepspeed-universal"
SEPARATE_STATE = "deepspeed-separate"
CONVERSIONS = (UNIVERSAL_STATE, SEPARATE_STATE)
WEIGHTS_FOLDER = "zero"
SHARED_STATE = f"{WEIGHTS_FOLDER}/optimizer_state.pt"
# In a conversion: the names of all its files, which nothing else says. Those of before have none.
FILES, FILES_KEY = "files.json", "files"


def state_files(trainer: Mapping[str, Any]) -> list[str]:
    """Return the files that all ranks have written of a checkpoint's state, by its `trainer.json`.

    DeepSpeed itself misses none: without a rank's share it goes on with an optimizer that has forgotten everything.
    """
    zero_stage, shards = (
        trainer["zero_stage"],
        [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(trainer["num_ranks"])],
    )
    weights = [f"{shard}_model_states.pt" for shard in shards] if zero_stage == 3 else ["mp_rank_00_model_states.pt"]
    kind = "bf16_" if trainer["dtype"] == "bf16" else ""
    optimizer = [f"{kind}{shard}_optim_states.pt" for shard in shards] if zero_stage > 0 else []
    return [f"{STATE}/{name}" for name in (*weights, *optimizer)]


def conversion_damage(folder: Path, *, is_thorough: bool = False) -> str | None:
    """Return what is wrong with a `deepspeed-universal/` or `deepspeed-separate/`, the file first; None if it is whole.

    Args:
        folder: of the conversion.
        is_thorough: reads all of every file, and compares checksums.
    """
    listed = state_damage(folder / FILES, keys={FILES_KEY: list})
    if listed is None:
        files = read_state(folder / FILES, mend="remove it")[FILES_KEY]
    elif listed == "does not exist":
        files = _former_files(folder)
    else:
        return f"{folder.name}/{FILES} {listed}"
    for name in files:
        if damage := weight_file_damage(folder / name, is_thorough=is_thorough):
            return f"{folder.name}/{name} {damage}"
    return None


def list_files(folder: Path) -> None:
    """Write down which files a conversion has, that has just been made."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pt"))
    atomic_write_json(folder / FILES, {FILES_KEY: names})


def _former_files(folder: Path) -> list[str]:
    """Return what must be in a conversion without a list: for each weight there is, what there is of any of them."""
    weights = [path for path in sorted((folder / WEIGHTS_FOLDER).glob("*")) if path.is_dir()]
    of_weight = sorted({path.name for weight in weights for path in weight.glob("*.pt")})
    files = [path.name for path in sorted(folder.glob("*model_states.pt"))] or ["mp_rank_00_model_states.pt"]
    if (folder / WEIGHTS_FOLDER).is_dir():
        files.append(SHARED_STATE)
    return files + [f"{WEIGHTS_FOLDER}/{weight.name}/{name}" for weight in weights for name in of_weight]

"""What the app offers: checkpoints and adapters of a run, with what is to be known of each, and prompts to try."""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from errors import UserError
from pipelines.store.bases import RUN
from pipelines.store.checkpoints import ADAPTER, LATEST, checkpoint_folders, kind_of_weights, read_trainer
from pixart.processes.specs import spec_of_trainer
from sampling.config import SamplingConfig
from sampling.prompts import read_prompts

MOST_EXAMPLES = 6
CAPTIONS_COLUMNS = ["caption", "reject"]


def checkpoint_choices(run: Path, named: tuple[str, str] | None = None) -> list[tuple[str, str]]:
    """Label and folder of every checkpoint of a run that draws texts, by stage, the latest step of each first.

    `named` is the label and folder of another one, offered first where the run does not have it. One whose
    `trainer.json` cannot be read is in the list too, and is refused with the reason when it is chosen.
    """
    found = []
    for stage in sorted((run / "training").glob("*")):
        for folder in reversed(checkpoint_folders(stage)):
            try:
                trainer = read_trainer(folder)
            except UserError:
                found.append((f"{_stage_title(stage.name)}, {folder.name} · damaged", str(folder)))
                continue
            if trainer["kind"] == "pixart":
                found.append((_label(stage, folder, trainer), str(folder)))
    return found if named is None or named[1] in [folder for _, folder in found] else [named, *found]


def adapter_choices(run: Path, named: Sequence[str]) -> list[tuple[str, str]]:
    """Label and location, as `sampling.lora` has it, of the adapters named and of a run's checkpoints of adapters.

    One whose `trainer.json` cannot be read is in no list: the checkpoints say that it is damaged.
    """
    found = {location: location for location in named}
    for stage in sorted((run / "training").glob("*")):
        for folder in reversed(checkpoint_folders(stage)):
            try:
                trainer = read_trainer(folder)
            except UserError:
                continue
            if kind_of_weights(trainer) == ADAPTER:
                found[f"{RUN}/training/{stage.name}/{folder.name}"] = _label(stage, folder, trainer)
    return [(label, location) for location, label in found.items()]


def _label(stage: Path, folder: Path, trainer: dict) -> str:
    shapes = len(trainer["buckets"])
    said = [
        f"{trainer['resolution']} px" + (f", {shapes} sizes" if shapes > 1 else ""),
        spec_of_trainer(trainer)["name"],
        "finished" if trainer["step"] >= trainer["num_steps"] else f"of {trainer['num_steps']:,} steps",
    ]
    latest = stage / LATEST
    if latest.is_file() and latest.read_text().strip() == folder.name:
        said.append("latest")
    return f"{_stage_title(stage.name)}, step {trainer['step']:,} · {', '.join(said)}"


def _stage_title(name: str) -> str:
    return re.sub(r"^stage(?=[0-9])", "stage ", name)


def example_prompts(config: SamplingConfig, run: Path) -> list[str]:
    """Prompts that the run knows, spread over its prompt file, or of its captions; none where it has neither."""
    texts: list[str] = []
    if config.prompts is not None:
        try:
            prompts = read_prompts(
                Path(config.prompts.replace("{run}", str(run))), seed=config.seed, column=config.prompt_column
            )
            texts = [prompt.text for prompt in prompts]
        except UserError:
            pass  # `make sample` says what is wrong with it; here one types
    if not texts:
        for path in sorted((run / "captions").glob("*.parquet"))[:1]:
            rows = pq.read_table(path, columns=CAPTIONS_COLUMNS).to_pylist()
            texts = [row["caption"] for row in rows if row["reject"] is None and row["caption"]]
    distinct = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    return distinct[:: max(len(distinct) // MOST_EXAMPLES, 1)][:MOST_EXAMPLES]

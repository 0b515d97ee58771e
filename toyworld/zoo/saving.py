"""Writing transformers models in half the bytes."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from pipelines.store.files import atomic_write_json


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Save weights as fp16 and a config that says float32, so that `from_pretrained` computes in fp32 by default."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    for part in ("text_config", "vision_config"):
        if part in config:
            config[part]["dtype"] = "float32"
    atomic_write_json(folder / "config.json", config)

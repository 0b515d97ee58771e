"""A studio over a run of tiny checkpoints, and wishes for it, for tests of the app."""

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.engine.run import EngineConfig
from sampling.app_studio import Studio, Wish
from sampling.config import SamplingConfig
from sampling.trained_model import open_run_model

PROMPT = "a red circle, left"


def make_studio(run: Path, stage: int = 3, *, solver: Literal["dpm-solver++", "iddpm"] = "dpm-solver++") -> Studio:
    config = SamplingConfig(num_steps=3, text_dtype="float32", solver=solver)
    trained = open_run_model(run, f"stage{stage}")
    return Studio(config, trained, run=run, name=f"stage{stage}-app", engine=EngineConfig(in_process=True))


def wish(**changes: object) -> Wish:
    table = {"prompt": PROMPT, "negative_prompt": "", "size": "48x32", "solver": "dpm-solver++", "num_steps": 3}
    return Wish(**(table | {"guidance_scale": 4.5, "seed": 11} | changes))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)

"""What tests of control draw by `make sample`, and what it says, of a run of `sampling_run.py`."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sampling_run import write_recipe

from sampling.__main__ import main


def listening(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Let `caplog` have what drawing says."""
    monkeypatch.setattr(logging.getLogger("sampling"), "propagate", True)
    caplog.set_level("INFO")
    return caplog


def sample(run: Path, stage: str, *flags: str, **table: object) -> Path:
    """Draw; returns the folder of the samples."""
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", stage, *flags])
    name = f"stage{stage}" if stage.isdigit() else stage
    return run / "samples" / (f"{name}-prompt" if "prompt" in table else name)


def drawn(run: Path, stage: str = "edges", **table: object) -> np.ndarray:
    """The picture of one prompt."""
    folder = sample(run, stage, **({"prompt": "a star"} | table))
    (path,) = (path for path in folder.glob("*.png") if path.name != "grid.png")
    return pixels(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def words(said: pytest.LogCaptureFixture) -> str:
    return " ".join(said.text.split())


def save_noise(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    return path

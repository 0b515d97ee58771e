"""A studio over a run of tiny checkpoints, wishes for it, and the app in a browser, for tests of the app."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from chromium import open_chromium, require_chromium
from PIL import Image

from pipelines.engine.run import EngineConfig
from sampling.app_studio import Studio, Wish
from sampling.config import SamplingConfig
from sampling.trained_model import open_run_model

REPOSITORY = Path(__file__).resolve().parent.parent
SCREENSHOT = os.environ.get("ATELIER_SCREENSHOT")
PROMPT = "a red circle, left"


def make_studio(run: Path, stage: int = 3, *, solver: Literal["dpm-solver++", "iddpm"] = "dpm-solver++") -> Studio:
    config = SamplingConfig(num_steps=3, text_dtype="float32", solver=solver)
    trained = open_run_model(run, f"stage{stage}")
    return Studio(config, trained, run=run, name=f"stage{stage}-app", engine=EngineConfig(in_process=True))


def wish(**changes: Any) -> Wish:
    table: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "size": "48x32",
        "solver": "dpm-solver++",
        "num_steps": 3,
    }
    return Wish(**(table | {"guidance_scale": 4.5, "seed": 11} | changes))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served_app(run: Path, recipe: Path, *, stage: str = "3") -> Iterator[str]:
    """The app as a user starts it; ended by Ctrl-C. Its log is `run/app.log`."""
    require_chromium()
    port = free_port()
    flags = ["--recipe", str(recipe), "--run", str(run), "--stage", stage, "--set", f"app.port={port}"]
    # A proxy that nobody answers at: whatever the app wanted from elsewhere would fail.
    environment = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment |= {"NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, "-m", "sampling.app", *flags]
    with (run / "app.log").open("w+") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        try:
            wait_for(port, process, run / "app.log")
            yield f"http://127.0.0.1:{port}/"
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline_seconds = time.monotonic() + 120
    while time.monotonic() < deadline_seconds:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"the app does not answer: {log.read_text()}")


@contextmanager
def opened_page(address: str) -> Iterator[Any]:
    """A tab of a browser, with a list of whom it tried to reach."""
    with open_chromium() as browser:
        tab: Any = browser.new_page(viewport={"width": 1240, "height": 980})
        tab.requested = []
        tab.on("request", lambda request: tab.requested.append(request.url))
        tab.goto(address)
        yield tab


def fill(page: Any, **fields: object) -> None:
    for name, value in fields.items():
        box = page.locator(f"#{name} textarea, #{name} input[type=number], #{name} input:not([type=range])").first
        box.fill(str(value))
        box.blur()


def shown_image(page: Any) -> np.ndarray:
    source = page.locator("#image img").get_attribute("src")
    data = page.request.get(source).body()
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)

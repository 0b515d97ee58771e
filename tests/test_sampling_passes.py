"""`sampling.guidance_interval` and `sampling.cache`: settings of an image like any other."""

import json
from pathlib import Path

import pytest
from PIL import Image
from sampling_run import make_run, write_recipe

from errors import UserError
from sampling.__main__ import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def sample(run: Path, stage: int, *flags: str, **table: object) -> None:
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", str(stage), *flags])


@pytest.mark.parametrize(
    "value", [[0.9, 0.1], [0.2, 0.2], [-0.1, 0.5], [0.5, 1.5], [0.5], [0.1, "0.5"], [True, 1], 0.5]
)
def test_an_interval_that_is_none_is_refused(run, value):
    with pytest.raises(UserError, match=r"sampling\.guidance_interval.*\[low, high\] between 0 \(no noise\) and 1"):
        sample(run, 2, guidance_interval=value)


@pytest.mark.parametrize("value", [0, 1, -2])
def test_a_cache_that_saves_nothing_is_refused(run, value):
    with pytest.raises(UserError, match=r"sampling\.cache.*greater than or equal to 2"):
        sample(run, 2, cache=value)


def test_interval_and_cache_are_settings_of_an_image(run, capsys):
    sample(run, 2)
    folder = run / "samples" / "stage2"
    plain = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    sample(run, 2, guidance_interval=[0.0, 1.0], cache=3)
    assert all((folder / name).read_bytes() != data for name, data in plain.items() if name != "grid.png")
    with Image.open(folder / "tall.png") as image:
        settings = json.loads(image.info["settings"])
    assert (settings["guidance_interval"], settings["cache"]) == ([0.0, 1.0], 3)
    capsys.readouterr()
    sample(run, 2, "--plan", guidance_interval=[0.3, 0.8], cache=2, num_steps=10)
    said = " ".join(capsys.readouterr().err.split())
    assert "10 steps · guidance 4.5 in [0.3, 0.8] · all blocks in every 2 passes: 48 passes of one image" in said
    sample(run, 2)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == plain

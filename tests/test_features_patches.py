"""The size of patches that features are cut for: typed, else of the weights that a stage of training starts from."""

import json
from pathlib import Path

import pytest

from features.patches import patch_size
from pipelines.command import parse_command

RECIPE = """
[features.small]
[features.large]
[training.first]
starts_from = "{weights}"
features = "small"
[training.large]
starts_from = "{run}/training/first"
[training.other]
features = "other"
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(RECIPE.replace("{weights}", "weights"))
    return tmp_path


def patch_of(table: str, *typed: str) -> int:
    argv = ["--recipe", "r.toml", "--run", "run", "--stage", table, *typed]
    return patch_size(parse_command("features", "", argv=argv, has_stages=True), table)


@pytest.mark.parametrize("place", [".", "transformer", "model"])
def test_it_is_that_of_the_folder_a_stage_starts_from_through_the_stages_before(house: Path, place: str) -> None:
    folder = Path("weights") / place
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", "patch_size": 4}))
    assert (patch_of("small"), patch_of("large"), patch_of("other")) == (4, 4, 2)
    assert patch_of("large", "--set", "model.patch_size=8") == 8


def test_weights_that_are_no_folder_here_have_the_default(house: Path) -> None:
    assert patch_of("small") == patch_of("large") == 2
    Path("weights").write_bytes(b"a file of torch")
    assert patch_of("large", "--set", "training.first.starts_from=large") == 2

"""Keys of `[training]` that one network alone has: they are for the stages that can, and refused in another's table."""

from pathlib import Path

import pytest

from errors import UserError
from pipelines.recipe import load_recipe
from training.config import StageTraining, stage_training

STAGES = '[training.stage1]\nnetwork = "dit"\n[training.stage2]\nnetwork = "pixart"\n'


def settings(folder: Path, recipe: str, stage: str) -> StageTraining:
    path = folder / "recipe.toml"
    path.write_text(recipe)
    return stage_training(load_recipe(path), stage)


def test_blocks_that_compress_are_those_of_pixarts(tmp_path: Path) -> None:
    recipe = f"[training]\nkv_compressed_blocks = [1]\n{STAGES}"
    assert settings(tmp_path, recipe, "stage2").kv_compressed_blocks == [1]
    assert settings(tmp_path, recipe, "stage1").kv_compressed_blocks is None


def test_the_table_of_a_dit_refuses_them(tmp_path: Path) -> None:
    recipe = STAGES.replace('"dit"\n', '"dit"\nkv_compressed_blocks = [0]\n')
    said = r"training\.stage1\.kv_compressed_blocks = \[0\] is for network pixart, but the stage's is 'dit'"
    with pytest.raises(UserError, match=said):
        settings(tmp_path, recipe, "stage1")

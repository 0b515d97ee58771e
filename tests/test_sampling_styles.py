"""`sampling.styles`: prompts in every style from one seed, a row a prompt and a column a style."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sampling_run import make_run, save_control_checkpoint, save_edges, write_recipe

from errors import MissingFileError, UserError
from sampling.__main__ import main
from sampling.config import SamplingConfig
from sampling.grid import CELL_PIXELS, GAP_PIXELS, MARGIN_PIXELS
from sampling.prompts import single_prompt
from sampling.styles import in_styles, read_styles


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "run")
    (run / "templates.txt").write_text("a {style} star\na {style} moon, {style}\n")
    return run


def sample(run: Path, stage: str, *flags: str, **table: object) -> list[dict[str, object]]:
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", stage, *flags])
    name = f"stage{stage}" if stage.isdigit() else stage
    return pq.read_table(run / "samples" / name / "samples.parquet").to_pylist()


def test_each_prompt_is_drawn_in_every_style_from_one_seed(run: Path) -> None:
    rows = sample(run, "2", "--set", "sampling.styles=red,dark blue", prompts="{run}/templates.txt")
    assert [row["prompt"] for row in rows] == [
        "a red star",
        "a dark blue star",
        "a red moon, red",
        "a dark blue moon, dark blue",
    ]
    keys = [str(row["key"]) for row in rows]
    assert [key.rpartition("-red")[0] for key in keys[::2]] == [key.rpartition("-dark-blue")[0] for key in keys[1::2]]
    seeds = [row["seed"] for row in rows]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


@pytest.mark.parametrize("num_images", [1, 2])
def test_the_grid_has_a_row_for_a_seed_and_a_column_for_a_style(run: Path, num_images: int) -> None:
    save_control_checkpoint(run, "edges")
    control = str(save_edges(run / "edges.png"))
    styles = [f"style {number}" for number in range(10)]
    for stage, table, num_columns in (("2", {}, 10), ("edges", {"control": control}, 11)):
        rows = sample(
            run,
            stage,
            prompts="{run}/templates.txt",
            styles=styles,
            images_per_prompt=num_images,
            num_grid_images=40,
            num_steps=1,
            **table,
        )
        name = "stage2" if stage == "2" else stage
        with Image.open(run / "samples" / name / "grid.png") as image:
            assert image.width == 2 * MARGIN_PIXELS + num_columns * CELL_PIXELS + (num_columns - 1) * GAP_PIXELS
            grid = np.asarray(image.convert("RGB")).astype(int)
        # What stands in the second column of styles of the last row is the second style from the prompt's last seed.
        first = num_columns - 10
        wanted = [row for row in rows if str(row["key"]).endswith("style-1")][-1]
        with Image.open(run / "samples" / name / str(wanted["file"])) as image:
            cell = np.asarray(image.resize((CELL_PIXELS, round(CELL_PIXELS * image.height / image.width)), 1))
        left = MARGIN_PIXELS + (first + 1) * (CELL_PIXELS + GAP_PIXELS)
        found = grid[:, left : left + CELL_PIXELS]
        tops = range(len(found) - len(cell))
        distances = [np.abs(found[top : top + len(cell)] - cell).mean() for top in tops]
        assert min(distances) < 4
        assert int(np.argmin(distances)) > len(found) // (2 * num_images) - CELL_PIXELS // 2


def test_styles_come_from_a_file_as_well(run: Path) -> None:
    (run / "styles.txt").write_text("oil, on canvas\n\npencil\n")
    assert read_styles(["{run}/styles.txt"], run=run) == ["oil, on canvas", "pencil"]
    typed = SamplingConfig.model_validate({"styles": "oil, pencil"})
    assert typed.styles == ["oil", "pencil"]
    assert SamplingConfig.model_validate({"styles": "my styles, both.txt"}).styles == ["my styles, both.txt"]


def test_neither_of_template_and_styles_goes_without_the_other(run: Path) -> None:
    with pytest.raises(UserError, match=r"has a \{style\}, and sampling\.styles is not set: type .*STYLES"):
        in_styles([single_prompt("a {style} star", seed=0)], [])
    with pytest.raises(UserError, match=r"sampling\.styles is set, but the prompt 'a star' has no \{style\}"):
        in_styles([single_prompt("a {style} star", seed=0), single_prompt("a star", seed=0)], ["red"])
    for styles, match in ((["red", "Red!"], "'red' and 'Red!' would name the same"), (["red", ""], "a style is empty")):
        with pytest.raises(UserError, match=match):
            read_styles(styles, run=run)
    with pytest.raises(MissingFileError, match=r"sampling\.styles .*gone\.txt does not exist"):
        read_styles(["gone.txt"], run=run)
    with pytest.raises(UserError, match=r"sampling\.styles is set, but stage 1, step 7 knows classes"):
        sample(run, "1", styles=["red"])


def test_long_prompts_in_long_styles_still_name_files() -> None:
    styles = ["水" * 40, "水" * 39 + "油", "red"]
    prompts = in_styles([single_prompt("{style}的" + "画" * 80, seed=0)], styles)
    sizes = [len(prompt.key.encode()) for prompt in prompts]
    assert len({prompt.key for prompt in prompts}) == 3 and max(sizes) <= 200
    assert prompts[2].key.endswith("-red"), "no more is cut than must be"

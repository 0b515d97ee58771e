"""A run that is spoilt on purpose, and what a choice of its samples was worth."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioning.__main__ import main as caption
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.columns.choices import Choice
from pipelines.columns.written_choices import write_choice
from pipelines.recipe import load_recipe
from pipelines.store.files import sha256_file
from pipelines.store.summary import update_summary
from toyworld.config import ToyworldConfig
from toyworld.curation import CHOSEN, curation, score_curation
from toyworld.report import write_report
from toyworld.scenes import Scene
from toyworld.spoiling import CAPTION_KINDS, PICTURE_KINDS
from toyworld.spoilt import SOURCES, write_spoilt
from toyworld.wording import caption_hits

CONFIG = ToyworldConfig(num_spoilt_images=1200, samples_per_shard=200, num_prompts=3)
RECIPE = """
[data]
shards = "{run}/raw/*/*.tar"

[engine]
in_process = true

[captioning]
engine = "given"
"""
SCORES = {"all": {"all": 0.7}, "chosen": {"all": 0.88}, "sound": {"all": 0.9}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A spoilt run, whose captions are read, and a choice of those that are no loops and longer than 60 letters."""
    run = tmp_path_factory.mktemp("spoilt")
    write_spoilt(CONFIG, run)
    (run / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run)])
        caption()
    settings = ChoiceSettings.of(CHOSEN, {"where": "length(caption) > 60 and not flags.loop"})
    assert settings is not None
    write_choice(Choice(run, settings), [path.stem for path in (run / "captions").glob("*.parquet")])
    return run


def truth_of(run: Path) -> list[dict]:
    return pq.read_table(run / "raw" / "truth.parquet").to_pylist()


def test_as_much_is_spoilt_as_the_recipe_says_and_of_one_source_more(run: Path) -> None:
    rows = truth_of(run)
    assert len(rows) == len({row["key"] for row in rows}) == 1200
    share = {
        (column, name): sum(row[column] is not None for row in rows if name in (row["dataset"], "")) * 3 / 1200
        for column in ("spoilt_picture", "spoilt_caption")
        for name in SOURCES
    }
    for name, times in SOURCES.items():
        assert share["spoilt_picture", name] == pytest.approx(0.1 * times, abs=0.045)
        assert share["spoilt_caption", name] == pytest.approx(0.3 * times, abs=0.07)
    assert {row["spoilt_picture"] for row in rows} == {*PICTURE_KINDS, None}
    captions = [row["spoilt_caption"] for row in rows if row["spoilt_caption"]]
    assert set(captions) == set(CAPTION_KINDS)
    assert captions.count("swapped") / len(captions) == pytest.approx(0.5, abs=0.08)
    assert all(row["is_sound"] == (row["spoilt_picture"] is row["spoilt_caption"] is None) for row in rows)


def test_the_texts_beside_pictures_are_true_where_the_truth_says_so(run: Path) -> None:
    rows = {row["key"]: row for row in truth_of(run)}
    with tarfile.open(run / "raw" / "web" / "web_00000.tar") as tar:
        members = {Path(member.name): tar.extractfile(member) for member in tar}
        texts = {path.stem: file.read().decode() for path, file in members.items() if file and path.suffix == ".txt"}
    assert len(texts) == 200
    for key, text in texts.items():
        row = rows[key]
        is_told = all(caption_hits(Scene.from_json(row["scene"]), text))
        kind = row["spoilt_caption"]
        assert row["shard"] == "web_00000"
        assert is_told == (kind in (None, "false_object", "loop")), (kind, text)


def test_a_spoilt_run_is_written_with_the_same_bytes_again(run: Path, tmp_path: Path) -> None:
    write_spoilt(CONFIG, tmp_path)
    names = ["raw/truth.parquet", "raw/prompts.jsonl", "raw/web/web_00001.tar", "raw/stock/stock_00000.parquet"]
    assert [sha256_file(tmp_path / name) for name in names] == [sha256_file(run / name) for name in names]


def test_what_a_choice_left_out_is_counted_by_kind_and_source(run: Path) -> None:
    found = curation(run, {})
    assert found is not None and found.regained is None
    share = {row.kind: row.share for row in found.kinds}
    assert found.kinds[0].kind == "sound" and share["sound"] == 0
    assert share["refusal"] == share["loop"] == 1
    assert share["boilerplate"] > 0.9
    assert share["swapped"] == share["wrong colour"] == 0
    assert [row.kind for row in found.sources] == ["archive", "stock", "web"]
    assert sum(row.num_samples for row in found.sources) == 1200
    assert found.sources[1].share < found.sources[2].share
    assert found.where.startswith("length(caption)")


def test_what_the_choice_regains_is_in_the_summary(run: Path) -> None:
    figures = score_curation(run, SCORES)
    assert json.loads((run / "summary.json").read_text())["curation"] == {
        name: pytest.approx(value, abs=1e-4) for name, value in figures.items()
    }
    assert {name: figures[name] for name in SCORES} == {"all": 0.7, "chosen": 0.88, "sound": 0.9}
    assert figures["regained"] == pytest.approx(0.9)
    assert figures["precision"] == 1, "what it left out was spoilt"
    assert 0.05 < figures["recall"] < 0.3


def write_verdicts(run: Path, right: dict[str, list[int]]) -> dict[str, dict]:
    """Verdicts of pictures with two objects each, of which some are all right; returns the shares."""
    (run / "judge").mkdir(exist_ok=True)
    for name, counts in right.items():
        objects = [
            [{"has_position": True, "has_colour": True, "has_shape": place < count} for place in range(2)]
            for count in counts
        ]
        table = pa.table({"key": [f"{number:03d}" for number in range(len(counts))], "objects": objects})
        pq.write_table(table, run / "judge" / f"{name}.parquet")
    return {name: {"all": sum(counts) / (2 * len(counts))} for name, counts in right.items()}


def test_the_error_of_what_is_regained_is_that_of_other_prompts_drawn(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    rng = np.random.default_rng(0)
    chances = {"all": 0.75, "chosen": 0.93, "sound": 0.94}
    right = {name: rng.binomial(2, chance, 500) for name, chance in chances.items()}
    judged = write_verdicts(tmp_path / "run", {name: counts.tolist() for name, counts in right.items()})
    figures = score_curation(tmp_path / "run", judged)
    drawn = rng.integers(500, size=(2000, 500))
    sums = {name: counts[drawn].sum(axis=1) for name, counts in right.items()}
    regained = (sums["chosen"] - sums["all"]) / (sums["sound"] - sums["all"])
    assert figures["regained_error"] == pytest.approx(regained.std(), rel=0.1)
    recipe = load_recipe(run / "recipe.toml")
    others = {"position": 1.0, "colour": 0.9, "shape": 0.9, "extra": 0.0, "num_objects": 9, "num_images": 5}
    for name, found in judged.items():
        update_summary(tmp_path / "run", f"judge.{name}", others | found)
    page = write_report(recipe, tmp_path / "run").read_text()
    assert f"±&nbsp;{figures['regained_error']:.1%}" in page and "the standard error over the prompts" in page


def test_no_error_is_told_of_pictures_of_other_prompts(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    judged = write_verdicts(tmp_path / "run", {"all": [1, 0, 1], "chosen": [2, 2], "sound": [2, 2, 2]})
    assert "regained_error" not in score_curation(tmp_path / "run", judged)


def test_other_runs_have_no_such_table(tmp_path: Path) -> None:
    assert score_curation(tmp_path, SCORES) == {}
    assert not (tmp_path / "summary.json").exists()


def test_the_page_shows_what_was_left_out_and_what_it_regains(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    recipe = load_recipe(run / "recipe.toml")
    before = write_report(recipe, tmp_path / "run").read_text()
    assert "What the choice left out" in before and "Regained of the difference" not in before
    others = {"position": 1.0, "colour": 0.9, "shape": 0.9, "extra": 0.0, "num_objects": 9, "num_images": 5}
    for name, figures in SCORES.items():
        update_summary(tmp_path / "run", f"judge.{name}", others | figures)
    page = write_report(recipe, tmp_path / "run").read_text()
    assert re.search(r"Regained of the difference</th>\s*<td[^>]*>90\.0%", page)
    assert re.search(r"caption: refusal</th>\s*<td[^>]*>(\d+)</td><td[^>]*>\1</td>\s*<td[^>]*>100\.0%", page)
    assert re.search(r"<tr><th scope=\"row\">sound</th>\s*<td[^>]*>\d+</td><td[^>]*>0</td>", page)
    assert "length(caption) &gt; 60 and not flags.loop" in page
    assert re.search(r"<dt>Regained by the choice</dt>\s*<dd>90\.0%</dd>", page)
    assert "the texts that came with the images" in page and "LLaVA" not in page and "Named in alt text" not in page

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.recipe import load_recipe
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from pipelines.store.previews import write_previews
from pipelines.store.summary import update_summary
from toyworld import judge as judge_module
from toyworld.charts import Scale, loss_chart
from toyworld.config import ToyworldConfig
from toyworld.judge import ObjectHit, Verdict
from toyworld.page_filters import reason
from toyworld.render import render
from toyworld.report import write_report
from toyworld.score_curves import in_order_of_steps, score_curves
from toyworld.scoring import read_prompt_scenes, score_run
from toyworld.world import write_world
from training.previews.page import write_page

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'é' 红"


class WrongColourJudge:
    """Finds everything, but the first object of each scene in the wrong colour."""

    @classmethod
    def load(cls, path):
        return cls()

    def score_batch(self, images, scenes):
        return [
            Verdict(tuple(ObjectHit(item, True, n > 0, True) for n, item in enumerate(scene.objects)), num_extra=0)
            for scene in scenes
        ]


class Page(HTMLParser):
    """Collects a page's references, ids and text."""

    def __init__(self, text):
        super().__init__()
        self.references, self.ids, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text += data


def write_recipe(run):
    path = run / "small.toml"
    path.write_text(
        '[data]\nshards = "{run}/raw/*/*.tar"\n'
        "[toyworld]\nnum_laion = 12\nnum_sa = 8\nnum_hq = 4\nnum_imagenet = 4\nnum_prompts = 6\n"
        f"broken_fraction = 0.0\nnum_report_examples = 8\njudge = {json.dumps(str(run / 'raw'))}\n"
        "[dataset_stats.sets]\nraw = {}\ndense = {}\n[training]\nstage1 = {}\nstage2 = {}\nstage3 = {}\n"
    )
    return load_recipe(path)


def write_captions(run):
    rows = {}
    for row in pq.read_table(run / "raw" / "truth.parquet").to_pylist():
        if row["dataset"] != "imagenet":
            caption = row["description"] if row["key"] != "sa_3" else f"Nothing to see. {HOSTILE}"
            text = {"key": row["key"], "shard": row["shard"], "alt_text": HOSTILE, "caption": caption, "reject": None}
            rows.setdefault(row["shard"], []).append(text)
    schema = pa.schema([(name, pa.string()) for name in ("key", "shard", "alt_text", "caption", "reject")])
    directory = ShardDirectory(run / "captions")
    fingerprint = Fingerprint.of({})
    for shard, texts in rows.items():
        directory.path.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(texts, schema=schema), directory.file(shard, ".parquet"))
        count = len(texts)
        report = ShardReport(name=shard, source="-", num_read=count + 2, num_kept=count, rejected={"corrupt_image": 2})
        directory.write_marker(report, fingerprint)
    directory.write_manifest(fingerprint, sorted(rows), upstream={}, extra={})


def write_samples(run):
    folder = run / "samples" / "stage2"
    folder.mkdir(parents=True)
    rows = []
    for (key, prompt), scene in read_prompt_scenes(run).items():
        render(scene, 64, 48, rng=np.random.default_rng(0)).save(folder / f"{key}.png")
        rows.append({"key": key, "prompt": prompt, "seed": 0, "file": f"{key}.png", "width": 64, "height": 48})
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    Image.new("RGB", (8, 8)).save(folder / "grid.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("demo")
    recipe = write_recipe(run)
    write_world(recipe.table("toyworld", ToyworldConfig), run)
    write_captions(run)
    write_samples(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "Judge", WrongColourJudge)
        score_run(recipe.table("toyworld", ToyworldConfig), run)
    update_summary(run, "seconds.captioning", 75)
    update_summary(run, "seconds.training.stage2", 61.0)
    figures = {"distinct_nouns": 40, "valid_distinct_nouns": 10, "total_nouns": 900, "nouns_per_image": 2.5}
    for name in ("dense", "raw"):
        update_summary(run, f"dataset_stats.{name}", figures)
    (run / "training" / "stage2").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 3, 4, 3, 4, 5)]
    (run / "training" / "stage2" / "metrics.jsonl").write_text("".join(lines) + '{"step": 6, "lo')
    stage = run / "training" / "stage2"
    for step in range(0, 100, 10):
        write_previews(stage, step, [("a <small> dot", Image.new("RGB", (8, 8), (step, 0, 0)))])
    write_page(stage)
    return run


@pytest.fixture(scope="module")
def page(finished):
    return write_report(load_recipe(finished / "small.toml"), finished).read_text()


def test_page_stands_alone_and_its_links_exist(finished, page):
    parsed = Page(page)
    assert len(page) < 3e6 and "script" not in parsed.tags and "link" not in parsed.tags
    assert "@import" not in page and "url(" not in page
    for reference in parsed.references:
        if reference.startswith("#"):
            assert reference[1:] in parsed.ids
        elif not reference.startswith("data:image/"):
            assert (finished / reference).is_file(), reference
    assert "samples/stage2/grid.png" in parsed.references and "summary.json" in parsed.references


def test_previews_of_a_stage_are_below_its_curve_first_and_last_among_them(finished, page):
    assert "a &lt;small&gt; dot" in page
    shown = re.findall(r"<figcaption>(start|\d+)</figcaption>", page[page.index("a &lt;small&gt; dot") :])
    assert shown == ["start", "10", "20", "30", "50", "60", "70", "90"]
    assert "training/stage2/previews/index.html" in Page(page).references


def test_unchanged_page_is_left_alone(finished, page):
    written_at = (finished / "index.html").stat().st_mtime_ns
    write_report(load_recipe(finished / "small.toml"), finished)
    assert (finished / "index.html").stat().st_mtime_ns == written_at


def test_texts_from_the_data_are_escaped(page):
    assert "<script" not in page
    assert HOSTILE in Page(page).text


def test_page_shows_what_the_stages_made(page):
    text = " ".join(Page(page).text.split())
    assert "24 captions 6 rejected: corrupt image" in text
    assert "1 min 15 s" in text and "1 min 01 s" in text
    assert "5 steps" in text and "0.200 at the end" in text
    assert "10 / 40" in text and "25.0%" in text
    assert text.index("raw 10 / 40") < text.index("dense 10 / 40")
    assert "wrong colour" in text and "✗" in text


def test_each_cell_says_on_a_phone_which_column_it_is_of(page):
    """Tables as wide as a desktop were cut off there; what is not shown of them cannot be read."""
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        columns = re.findall(r'<th scope="col">(.*?)</th>', table)
        for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", table, re.DOTALL):
            assert (
                re.findall(r'<td[^>]*? data-label="(.*?)"', row) == columns[1:] and row.count("<td") == len(columns) - 1
            )


def test_reasons_of_rejects_are_words():
    assert reason("corrupt_image") == "corrupt image" and reason("caption:no_caption") == "no caption (not captioned)"


def test_page_shows_misses_among_the_captions(page):
    assert "Nothing to see." in Page(page).text


def test_missing_stages_are_not_run_yet(page, tmp_path):
    assert "make train STAGE=stage1" in page and "make train STAGE=stage2" not in page
    run = tmp_path / "empty"
    run.mkdir()
    text = Page(write_report(write_recipe(run), run).read_text()).text
    for command in ("make stats", "make train STAGE=stage3", "make sample STAGE=stage2", "make judge"):
        assert command in text


def test_marks_of_other_samples_are_not_shown(finished, page, tmp_path):
    assert Page(page).text.count("wrong colour") == 6
    image = finished / "samples" / "stage2" / "prompt_0000.png"
    before = image.read_bytes()
    try:
        Image.new("RGB", (64, 48), "red").save(image)
        later = write_report(load_recipe(finished / "small.toml"), finished).read_text()
    finally:
        image.write_bytes(before)
    assert "wrong colour" not in later


def test_a_run_without_a_world_has_what_was_made_and_nothing_of_the_judge(finished, tmp_path):
    run = tmp_path / "cat"
    for name in ("samples", "training"):
        shutil.copytree(finished / name, run / name)
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[training]\nstage1 = {}\nstage2 = {}\n")
    page = write_report(load_recipe(recipe), run).read_text()
    text = Page(page).text
    assert "5 steps" in text and "previews" in text and page.count('<div class="preview">') == 1
    assert page.count('<div class="frame">') == 6
    for said in ("LLaVA", "coloured", "wrong colour", "make judge", "make train", "not run yet", "Not run yet"):
        assert said not in text, said


def test_companion_run_is_compared(finished):
    other = finished.with_name(finished.name + "-raw")
    update_summary(
        other,
        "judge.stage2",
        {"position": 0.5, "colour": 0.125, "shape": 0.1, "all": 0.0, "extra": 1.0, "num_objects": 8, "num_images": 6},
    )
    text = Page(write_report(load_recipe(finished / "small.toml"), finished).read_text()).text
    assert f"Stage 2 on alt texts ({other.name})" in text and "12.5%" in text


def test_report_needs_a_run(finished):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report(load_recipe(finished / "small.toml"), finished / "nowhere")


@pytest.mark.parametrize(
    "losses", [[0.5], [0.1] * 50, list(np.geomspace(2, 0.01, 4000)), [1.0, math.nan, 0.5, math.inf, 0.2]]
)
def test_loss_chart_stays_inside_its_frame(losses):
    svg = loss_chart(list(enumerate(losses, 1)), label="a <loss>")
    assert "&lt;loss&gt;" in svg and "nan" not in svg and "inf" not in svg
    for points in re.findall(r'points="([^"]*)"', svg):
        places = [tuple(map(float, pair.split(","))) for pair in points.split()]
        assert 1 <= len(places) <= 360
        assert all(0 <= x <= 360 and 0 <= y <= 210 for x, y in places)
    assert svg.count("<text") >= 4


def test_scores_of_checkpoints_are_a_curve_in_the_order_of_steps():
    scores = {"vae-100": 0.5, "vae-50": 0.0, "vae-1000": 1.0, "vae": 0.9, "stage3-512": 0.3, "former": 0.8}
    judged = {name: {"all": score} for name, score in scores.items()}
    (curve,) = score_curves(judged, stages=["vae"])
    assert not score_curves(judged, stages=["vae-50", "vae-100", "vae-1000"]), "resolutions, each a stage"
    assert (curve.name, curve.points) == ("vae", [(50, 0.0), (100, 0.5), (1000, 1.0)])
    assert sorted(scores, key=in_order_of_steps) == ["former", "stage3-512", "vae", "vae-50", "vae-100", "vae-1000"]
    assert 'aria-label="Objects all right, samples of vae: 100.0% at step 1000"' in curve.chart
    places = [tuple(map(float, pair)) for pair in re.findall(r'cx="([^"]*)" cy="([^"]*)"', curve.chart)]
    (low, half, high) = (y for _, y in places)
    assert low > half > high and low - half == pytest.approx(half - high, abs=0.2)
    assert 2 * (places[0][0] - 44) == pytest.approx(places[1][0] - 44, abs=0.2), "steps are in scale, from 0 on"


def test_loss_chart_without_losses_says_so():
    with pytest.raises(ValueError, match="stage 1: no loss is finite and positive"):
        loss_chart([(1, math.nan)], label="stage 1")


@pytest.mark.parametrize(("low", "high"), [(0.05, 1.4), (0.2, 0.26), (1e-4, 3.0)])
def test_logarithmic_ticks_are_round_and_inside(low, high):
    ticks = Scale(low, high, 0, 100, is_log=True).ticks()
    assert 2 <= len(ticks) <= 8 and all(low <= value <= high for value in ticks)
    assert all(float(f"{value:.2g}") == value for value in ticks)


def test_a_recipe_that_shows_one_thing_has_that_and_nothing_that_it_never_runs(tmp_path):
    run = tmp_path / "few"
    run.mkdir()
    recipe = tmp_path / "few.toml"
    recipe.write_text("[toyworld]\n[training]\nlcm = {}\ndmd = {}\n")
    figures = {"teacher": 0.92, "2": 0.864, "4": 0.901}
    (run / "summary.json").write_text(json.dumps({"lcm": figures}))
    text = " ".join(Page(write_report(load_recipe(recipe), run).read_text()).text.split())
    assert "In 2 steps 86.4%" in text and "In 4 steps 90.1%" in text and "in 20 of the teacher 92.0%" in text
    for said in ("make stats", "make train STAGE=dmd", "make sample STAGE=lcm", "make judge", "Stage 2"):
        assert said not in text, said

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from pipelines.store.summary import read_summary
from toyworld import judge as judge_module
from toyworld.axes import AXES
from toyworld.config import ToyworldConfig
from toyworld.judge import ObjectHit, Verdict
from toyworld.render import ANCHORS, OBJECT_RGB, render
from toyworld.scenes import COLOURS, POSITIONS, Scene, SceneObject
from toyworld.scoring import judge_samples, score_captions, score_run
from toyworld.wording import describe

RED_CIRCLE = SceneObject("circle", "red", "large", "left")
BLUE_STAR = SceneObject("star", "blue", "large", "right")
SCENES = {
    "a": Scene((RED_CIRCLE, BLUE_STAR), "white", "plain"),
    "b": Scene((BLUE_STAR,), "black", "plain"),
}


class PixelJudge:
    """Tells colours from the pixel at each anchor, and takes every shape for the right one."""

    num_calls = 0

    @classmethod
    def load(cls, path):
        return cls()

    def score_batch(self, images, scenes):
        PixelJudge.num_calls += 1
        return [self._score(image, scene) for image, scene in zip(images, scenes, strict=True)]

    def look(self, images):
        return [{place: ("circle", colour) for place, colour in self._colours(image).items()} for image in images]

    def _colours(self, image):
        seen = {}
        for position in POSITIONS:
            x, y = ANCHORS[position]
            pixel = np.array(image.getpixel((int(x * image.width), int(y * image.height))))
            distances = {colour: abs(pixel - OBJECT_RGB[colour]).max() for colour in COLOURS}
            colour = min(distances, key=lambda name: distances[name])
            if distances[colour] < 30:
                seen[position] = colour
        return seen

    def _score(self, image, scene):
        seen = self._colours(image)
        shapes = {item.position: item.shape for item in scene.objects}
        hits = tuple(
            ObjectHit(item, item.position in seen, seen.get(item.position) == item.colour, item.position in seen)
            for item in scene.objects
        )
        found = {position: (shapes.get(position, "star"), colour) for position, colour in seen.items()}
        return Verdict(hits, num_extra=len(seen.keys() - shapes.keys()), seen=found)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "Judge", PixelJudge)
    (tmp_path / "raw").mkdir()
    truth = [
        {"key": key, "dataset": dataset, "shard": f"{dataset}_0", "scene": SCENES[key].to_json(), "description": "-"}
        for dataset in ("laion", "sa")
        for key in SCENES
    ]
    pq.write_table(pa.Table.from_pylist(truth), tmp_path / "raw" / "truth.parquet")
    rows = [
        {"key": key, "prompt": describe(scene), "aspect_ratio": 1.0, "scene": json.loads(scene.to_json())}
        for key, scene in SCENES.items()
    ]
    (tmp_path / "raw" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write_captions(run, dataset, rows):
    (run / "captions").mkdir(exist_ok=True)
    columns = ("key", "alt_text", "caption", "reject")
    table = [dict(zip(columns, row, strict=True)) | {"shard": f"{dataset}_0"} for row in rows]
    schema = pa.schema([(name, pa.string()) for name in (*columns, "shard")])
    name = f"{dataset}_0"
    pq.write_table(pa.Table.from_pylist(table, schema=schema), run / "captions" / f"{name}.parquet")
    report = ShardReport(name=name, source="-", num_read=len(rows), num_kept=len(rows))
    ShardDirectory(run / "captions").write_marker(report, Fingerprint.of({}))


def write_samples(run, stage, pictures, **replaced):
    folder = run / "samples" / stage
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for key, scene in pictures.items():
        render(scene, 64, 64, rng=np.random.default_rng(0)).save(folder / f"{key}.png")
        prompt = describe(SCENES[key]) if key in SCENES else "a cactus in the Sahara"
        rows.append({"key": key, "prompt": prompt, "seed": 0, "file": f"{key}.png", "width": 64, "height": 64})
    pq.write_table(pa.Table.from_pylist([row | replaced for row in rows]), folder / "samples.parquet")
    return folder


def test_captions_are_scored_per_object_and_rejects_are_no_misses(run):
    write_captions(
        run,
        "laion",
        [
            ("a", "Red Circle - sale", "A big red circle on the left and a blue star at the top.", None),
            ("b", "IMG_1.jpg", None, "corrupt_image"),
        ],
    )
    write_captions(run, "sa", [("a", None, describe(SCENES["a"]), None), ("x", None, "A star.", None)])
    score_captions(run)
    figures = read_summary(run)["captioning"]
    assert (figures["right"], figures["objects"], figures["accuracy"]) == (3, 4, 0.75)
    assert figures["by_dataset"]["laion"]["accuracy"] == 0.5 and figures["by_dataset"]["sa"]["accuracy"] == 1.0
    assert figures["by_dataset"]["laion"]["named_in_alt_text"] == 0.5
    assert figures["captions"] == 2 and figures["not_scored"] == {"rejected_upstream": 1, "no_scene": 1}
    assert figures["named_in_caption"] == 1.0 and figures["invented_per_caption"] == 0.5
    rows = {(row["shard"], row["key"]): row for row in pq.read_table(run / "judge" / "captions.parquet").to_pylist()}
    assert rows["laion_0", "a"]["hits"] == [True, False] and rows["laion_0", "a"]["num_invented"] == 1
    report = json.loads((run / "judge" / ".done" / "captions.json").read_text())["report"]
    assert report["num_read"] == 4 and report["rejected"] == {"rejected_upstream": 1, "no_scene": 1}


def test_samples_are_scored_against_the_scene_of_their_prompt(run):
    wrong = Scene((RED_CIRCLE, SceneObject("star", "green", "large", "right")), "white", "plain")
    folder = write_samples(run, "stage2", {"a": wrong, "b": SCENES["a"], "c": SCENES["a"]})
    judge_samples(ToyworldConfig(judge=str(run / "raw")), run, folder)
    score = read_summary(run)["judge"]["stage2"]
    assert score["num_objects"] == 3 and score["num_images"] == 2 and score["num_not_judged"] == 1
    assert score["position"] == 1.0 and score["colour"] == pytest.approx(2 / 3) == score["all"]
    assert score["extra"] == 0.5
    assert score["axes"]["colour_binding"] == {"score": 0.0, "num_images": 1}
    assert score["axes"]["count"] == {"score": 0.5, "num_images": 2}
    written = json.loads((run / "judge" / "stage2.json").read_text())
    assert written["axes"] == [{"name": name, **score["axes"][name]} for name in AXES]
    assert written["samples_fingerprint"] is None
    assert set(json.loads((run / "judge" / ".done" / "stage2.json").read_text())["report"]["files"]) == {
        ".json",
        ".parquet",
    }
    rows = {row["key"]: row for row in pq.read_table(run / "judge" / "stage2.parquet").to_pylist()}
    assert [item["has_colour"] for item in rows["a"]["objects"]] == [True, False]
    assert rows["b"]["num_extra"] == 1 and not rows["b"]["is_right"] and "c" not in rows


def test_samples_of_the_evaluation_are_judged_too_and_stay_out_of_the_summary(run):
    folder = write_samples(run, "stage2", {"a": SCENES["a"]})
    (run / "evaluation" / "samples").mkdir(parents=True)
    folder.rename(run / "evaluation" / "samples" / "stage2-cfg3")
    score_run(ToyworldConfig(judge=str(run / "raw")), run)
    axes = json.loads((run / "judge" / "stage2-cfg3.json").read_text())["axes"]
    assert {axis["name"]: axis["score"] for axis in axes}["spatial"] == 1.0
    assert "judge" not in read_summary(run)


def test_changed_prompt_is_not_judged_by_an_old_scene(run):
    folder = write_samples(run, "stage2", {"a": SCENES["a"]}, prompt="something else")
    judge_samples(ToyworldConfig(judge=str(run / "raw")), run, folder)
    assert "judge" not in read_summary(run)
    assert pq.read_table(run / "judge" / "stage2.parquet").num_rows == 0


def test_class_samples_are_right_wherever_the_object_stands(run):
    pictures = {"two": SCENES["a"], "one": SCENES["b"], "other": SCENES["b"]}
    folder = write_samples(run, "stage1", pictures, prompt="class 2")  # blue circle
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    rows[2]["prompt"] = "class 0"  # red circle
    rows.append(rows[1] | {"key": "foreign", "prompt": "class 980"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    judge_samples(ToyworldConfig(judge=str(run / "raw")), run, folder)
    score = read_summary(run)["judge"]["stage1"]
    assert score["num_images"] == 3 and score["position"] == 1.0
    assert score["colour"] == pytest.approx(2 / 3) and score["extra"] == pytest.approx(1 / 3)
    verdicts = pq.read_table(run / "judge" / "stage1.parquet").to_pylist()
    assert [row["objects"][0]["has_colour"] for row in verdicts] == [True, True, False]


def test_scores_are_only_computed_when_samples_change(run):
    config = ToyworldConfig(judge=str(run / "raw"))
    write_samples(run, "stage3", SCENES)
    before = PixelJudge.num_calls
    score_run(config, run)
    score_run(config, run)
    assert PixelJudge.num_calls == before + 1
    write_samples(run, "stage3", {"a": SCENES["b"], "b": SCENES["b"]})
    score_run(config, run)
    assert PixelJudge.num_calls == before + 2
    assert read_summary(run)["judge"]["stage3"]["position"] == pytest.approx(2 / 3)


def test_run_without_a_toy_world_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no toy world"):
        score_run(ToyworldConfig(), tmp_path)

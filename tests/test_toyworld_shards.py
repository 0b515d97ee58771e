import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.raw.images import SampleReject, decode_image
from pipelines.raw.patterns import expand_shards
from pipelines.raw.shards import open_shard
from toyworld import world
from toyworld.config import ToyworldConfig
from toyworld.render import render
from toyworld.scenes import Scene, SceneObject, class_label
from toyworld.shards import encode_rle, object_mask
from toyworld.world import is_held_out, make_prompts, write_world


def small_config(**changes):
    defaults = {
        "num_laion": 24,
        "num_sa": 12,
        "num_hq": 8,
        "num_imagenet": 8,
        "samples_per_shard": 10,
        "num_prompts": 16,
        "broken_fraction": 0.0,
    }
    return ToyworldConfig(**(defaults | changes))


def tree(run):
    paths = sorted(path for path in (run / "raw").rglob("*") if path.is_file())
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_world(small_config(), folder)
    return folder


def decode_rle(text, size):
    """Read COCO's run lengths as its C code does, to check the encoder against."""
    runs, position = [], 0
    while position < len(text):
        value = shift = 0
        is_more = True
        while is_more:
            code = ord(text[position]) - 48
            position += 1
            value |= (code & 31) << (5 * shift)
            is_more = bool(code & 32)
            shift += 1
            if not is_more and code & 16:
                value |= -1 << (5 * shift)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    flat = np.concatenate([np.full(run, index % 2, dtype=bool) for index, run in enumerate(runs)])
    return flat.reshape(size, order="F")


def test_every_layout_is_recognised_and_every_sample_has_truth(run):
    truth = {(row["shard"], row["key"]): row for row in pq.read_table(run / "raw" / "truth.parquet").to_pylist()}
    num_samples = 0
    for path in expand_shards(str(run / "raw" / "*" / "*.tar")):
        with open_shard(path) as raw:
            for sample in raw.samples:
                row = truth[raw.name, sample.key]
                scene = Scene.from_json(row["scene"])
                assert sample.reject is None
                image = decode_image(raw.image_bytes(sample), max_pixels=10**6)
                if row["dataset"] == "hq":
                    assert 0.49 < image.width / image.height < 2.04
                else:
                    assert image.width == image.height and 64 <= image.width <= 96
                assert raw.label(sample) == (class_label(scene) if row["dataset"] == "imagenet" else None)
                assert bool(raw.alt_text(sample)) == (row["dataset"] in ("laion", "hq"))
                num_samples += 1
    assert num_samples == len(truth) == 24 + 12 + 8 + 8


def test_img2dataset_members_parquet_and_stats_say_the_same(run):
    folder = run / "raw" / "laion"
    rows = {row["key"]: row for row in pq.read_table(folder / "laion_00001.parquet").to_pylist()}
    with (folder / "laion_00001.tar").open("rb") as file:
        samples = list(group_by_keys(tar_file_expander([{"url": "laion_00001.tar", "stream": file}])))
    assert [sample["__key__"] for sample in samples] == list(rows) == [f"00001{index:04d}" for index in range(10)]
    for sample in samples:
        record = json.loads(sample["json"])
        assert record == rows[record["key"]]
        assert record["caption"] == sample["txt"].decode()
        assert record["status"] == "success" and record["error_message"] is None and record["exif"] == "{}"
        assert Image.open(io.BytesIO(sample["jpg"])).size == (record["width"], record["height"])
    stats = json.loads((folder / "laion_00001_stats.json").read_text())
    assert stats["successes"] == stats["count"] == stats["status_dict"]["success"] == 10


def test_sa1b_masks_cover_the_objects(run):
    with tarfile.open(run / "raw" / "sa" / "sa_000001.tar") as tar:
        assert tar.getnames() == ["./sa_11.jpg", "./sa_11.json", "./sa_12.jpg", "./sa_12.json"]
        record = json.load(tar.extractfile("./sa_11.json"))
    truth = pq.read_table(run / "raw" / "truth.parquet").to_pylist()
    scene = Scene.from_json(next(row["scene"] for row in truth if row["key"] == "sa_11"))
    image = record["image"]
    assert image == {**image, "image_id": 11, "file_name": "sa_11.jpg"}
    assert len(record["annotations"]) == len(scene.objects)
    for annotation in record["annotations"]:
        mask = decode_rle(annotation["segmentation"]["counts"], annotation["segmentation"]["size"])
        x, y, width, height = (int(value) for value in annotation["bbox"])
        column, row = (int(value) for value in annotation["point_coords"][0])
        assert mask.shape == (image["height"], image["width"])
        assert annotation["area"] == mask.sum() == mask[y : y + height, x : x + width].sum() > 50
        assert mask[row, column]


def test_masks_follow_shapes_and_run_lengths_survive_a_round_trip():
    rng = np.random.default_rng(0)
    square = SceneObject("square", "red", "large", "center")
    image = render(Scene((square,), "white", "plain"), 96, 64, rng=rng)
    mask = object_mask(image, square)
    rows, columns = np.nonzero(mask)
    assert 0.9 < mask.sum() / (np.ptp(rows) + 1) / (np.ptp(columns) + 1) <= 1
    for case in (mask, ~mask, np.zeros((3, 5), bool), np.ones((3, 5), bool), rng.random((40, 30)) < 0.5):
        assert np.array_equal(decode_rle(encode_rle(case), case.shape), case)


def test_same_recipe_gives_the_same_bytes(run, tmp_path):
    write_world(small_config(), tmp_path)
    assert tree(tmp_path) == tree(run)


def test_second_run_writes_nothing(run, caplog, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (run / "raw").rglob("*")}
    monkeypatch.setattr(world.log, "propagate", True)
    monkeypatch.setattr(world.log.parent, "propagate", True)
    write_world(small_config(), run)
    assert {path: path.stat().st_mtime_ns for path in (run / "raw").rglob("*")} == before
    assert "nothing to do" in caplog.text


def test_larger_world_keeps_the_samples_and_full_shards_it_has(run, tmp_path):
    write_world(small_config(), tmp_path)
    kept = tmp_path / "raw" / "laion" / "laion_00001.tar"
    written_at = kept.stat().st_mtime_ns
    write_world(small_config(num_laion=35), tmp_path)
    assert kept.stat().st_mtime_ns == written_at
    old, new = tree(run), tree(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(old["raw/laion/laion_00002.tar"])) as tar:
        first = {name: tar.extractfile(name).read() for name in tar.getnames()}
    with tarfile.open(fileobj=io.BytesIO(new["raw/laion/laion_00002.tar"])) as tar:
        second = {name: tar.extractfile(name).read() for name in tar.getnames()}
    assert len(first) == 12 and len(second) == 30 and first == {name: second[name] for name in first}


def test_smaller_world_removes_its_surplus_shards_only(run, tmp_path):
    write_world(small_config(), tmp_path)
    foreign = tmp_path / "raw" / "laion" / "mine.tar"
    foreign.write_bytes(b"")
    write_world(small_config(num_laion=10, num_sa=0), tmp_path)
    names = sorted(path.name for path in (tmp_path / "raw").rglob("*.tar"))
    assert names == ["hq_00000.tar", "imagenet_000000.tar", "laion_00000.tar", "mine.tar"]
    assert foreign.is_file()
    write_world(small_config(), tmp_path)
    foreign.unlink()
    assert tree(tmp_path) == tree(run)


def test_interrupted_world_is_continued_to_the_same_bytes(run, tmp_path, monkeypatch):
    drawn = []

    def failing_render(*arguments, **keywords):
        drawn.append(1)
        if len(drawn) > 27:
            raise KeyboardInterrupt
        return render(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(world, "render", failing_render)
        with pytest.raises(KeyboardInterrupt):
            write_world(small_config(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "raw").rglob("*.tar")) == [
        f"laion_0000{number}.tar" for number in range(3)
    ]
    write_world(small_config(), tmp_path)
    assert tree(tmp_path) == tree(run)


def test_another_seed_rewrites_everything(run, tmp_path):
    write_world(small_config(), tmp_path)
    write_world(small_config(seed=1), tmp_path)
    before, after = tree(run), tree(tmp_path)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before if name.endswith((".tar", "truth.parquet", ".jsonl")))


def test_no_prompt_shows_an_arrangement_of_a_shard(run):
    def arrangement(scene):
        return frozenset(scene.objects)

    rows = [json.loads(line) for line in (run / "raw" / "prompts.jsonl").read_text().splitlines()]
    prompts = [Scene.from_json(json.dumps(row["scene"])) for row in rows]
    truth = pq.read_table(run / "raw" / "truth.parquet").column("scene").to_pylist()
    shown = {arrangement(Scene.from_json(text)) for text in truth}
    assert len(rows) == 16 and {row["aspect_ratio"] for row in rows} == {1.0, 1.3333, 0.75, 2.0, 0.5}
    assert not shown & {arrangement(scene) for scene in prompts}
    assert all(is_held_out(scene) for scene in prompts)
    reversed_scene = Scene(prompts[0].objects[::-1], "white", "plain")
    assert is_held_out(reversed_scene)
    assert make_prompts(small_config(num_prompts=4)) == rows[:4]


def test_broken_images_are_rejected_by_the_decoder_and_keep_their_rows(tmp_path):
    write_world(small_config(broken_fraction=0.3, num_sa=0, num_hq=0, num_imagenet=0), tmp_path)
    reasons = []
    for path in expand_shards(str(tmp_path / "raw" / "laion")):
        with open_shard(path) as raw:
            for sample in raw.samples:
                try:
                    decode_image(raw.image_bytes(sample), max_pixels=10**6)
                except SampleReject as reject:
                    reasons.append(reject.reason)
    assert 1 <= len(reasons) <= 16 and set(reasons) == {"corrupt_image"}
    assert pq.read_table(tmp_path / "raw" / "truth.parquet").num_rows == 24


def test_sides_that_cross_name_both_values():
    with pytest.raises(ValueError, match="min_side_pixels 80 is larger than max_side_pixels 64"):
        small_config(min_side_pixels=80, max_side_pixels=64)


def test_help_and_plan_start_without_torch(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[toyworld]\nnum_laion = 7\n")
    code = (
        "import sys; from toyworld.__main__ import main; "
        f"main(['world', '--recipe', {str(recipe)!r}, '--run', {str(tmp_path / 'run')!r}, '--plan']); "
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "3,107 images" in result.stderr and not (tmp_path / "run").exists()

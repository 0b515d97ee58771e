"""What was left out, cut or resized to get a number stands beside it, in the JSON, the table and the curve."""

import csv
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_run import picture
from sampling_run import PROMPTS, make_run
from test_sampling_evaluation_scores import evaluate
from tiny_clip import save_clip

from errors import MissingFileError, UserError
from pipelines.engine.run import EngineConfig
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.features import Features, FeatureWorker, compute_features
from sampling.evaluation.image_sets import open_folder, open_reference, open_samples
from sampling.evaluation.networks import find_networks
from sampling.evaluation.sizes import SetSizes

LONG = "a very long prompt about two blue squares on a dark table " * 4


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def write_samples(folder: Path, prompts: list[str]) -> Path:
    """Write what sampling leaves: images, their table, a grid and a manifest."""
    folder.mkdir(parents=True)
    rows = [
        {"number": number, "key": str(number), "prompt": prompt, "seed": number, "file": f"{number}.png"}
        for number, prompt in enumerate(prompts)
    ]
    for number, row in enumerate(rows):
        picture(number, width=20, height=20).save(folder / row["file"])
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    picture(50, width=90, height=60).save(folder / "grid.png")
    (folder / "manifest.json").write_text("{}")
    (folder / ".done").mkdir()
    (folder / ".done" / "samples.json").write_text("{}")
    return folder


def add_pictures(folder: Path) -> None:
    """Put in what a user may: a picture, one in a folder, and a thumbnail."""
    (folder / "mine").mkdir()
    (folder / ".thumbnails").mkdir()
    for number, name in enumerate(("favourite.png", "mine/other.jpg", ".thumbnails/0.png")):
        picture(60 + number).save(folder / name)


def test_a_folder_of_samples_gives_its_samples_and_nothing_else(tmp_path, capsys):
    folder = write_samples(tmp_path / "stage2", ["a star", "a circle", "a square"])
    before = open_reference(str(folder), run=tmp_path, cache=tmp_path / "cache")
    capsys.readouterr()
    add_pictures(folder)
    images = open_reference(str(folder), run=tmp_path, cache=tmp_path / "cache")
    assert (images.num_images, images.identity) == (3, before.identity)
    assert dict(images.left_out) == {"hidden": 2, "no image by its name": 1, "not one of its samples.parquet": 3}
    said = " ".join(capsys.readouterr().err.split())
    assert "files left out: 2 hidden, 1 no image by its name, 3 not one of its samples.parquet" in said
    # Several of them at once, with a plain folder beside.
    write_samples(tmp_path / "stage3", ["a star"])
    (tmp_path / "photos").mkdir()
    picture(70).save(tmp_path / "photos" / "a.png")
    every = open_reference(str(tmp_path), run=tmp_path, cache=tmp_path / "cache")
    assert (every.num_images, every.left_out["not one of its samples.parquet"]) == (5, 4)


def test_a_sample_that_is_gone_is_named(tmp_path):
    folder = write_samples(tmp_path / "stage2", ["a star", "a circle"])
    (folder / "1.png").unlink()
    for open_it in (open_folder, open_samples):
        with pytest.raises(MissingFileError, match=r"stage2/1\.png does not exist, but .*samples\.parquet names it"):
            open_it(folder, cache=tmp_path)


@pytest.mark.parametrize("content", ["other columns", "no table", "a column of ours"])
def test_a_table_of_the_users_own_is_one_file_left_out(tmp_path, content):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        picture(number).save(folder / f"{number}.png")
    picture(9).save(tmp_path / "outside.png")
    rows = {"other columns": {"id": 1}, "a column of ours": {"file": "../outside.png"}}
    if content in rows:
        pq.write_table(pa.Table.from_pylist([rows[content]]), folder / "samples.parquet")
    else:
        (folder / "samples.parquet").write_bytes(b"PAR1 and no more")
    images = open_reference(str(folder), run=tmp_path, cache=tmp_path / "cache")
    assert (images.num_images, dict(images.left_out)) == (2, {"no image by its name": 1})


def test_a_damaged_table_of_ours_is_named_and_never_to_be_removed(tmp_path):
    folder = write_samples(tmp_path / "stage2", ["a star"])
    (folder / "samples.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"stage2/samples\.parquet is no readable table \(.*\); ") as said:
        open_reference(str(folder), run=tmp_path, cache=tmp_path / "cache")
    assert str(said.value).endswith(
        "`make verify` of the run that drew it says how to mend it, or name another evaluation.reference"
    )
    assert "remove" not in str(said.value)


def test_a_sample_outside_its_folder_is_refused(tmp_path):
    folder = write_samples(tmp_path / "stage2", ["a star"])
    picture(9).save(tmp_path / "outside.png")
    row = pq.read_table(folder / "samples.parquet").to_pylist()[0] | {"file": "../outside.png"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "samples.parquet")
    for open_it in (open_folder, open_samples):
        with pytest.raises(
            UserError, match=r"samples\.parquet names '\.\./outside\.png', which is no file of its own fold"
        ):
            open_it(folder, cache=tmp_path / "cache")


def test_samples_of_a_hidden_folder_do_not_count(tmp_path):
    write_samples(tmp_path / "set" / ".earlier", ["a star", "a circle"])
    picture(0).save(tmp_path / "set" / "0.png")
    images = open_reference(str(tmp_path / "set"), run=tmp_path, cache=tmp_path / "cache")
    assert (images.num_images, dict(images.left_out)) == (1, {"hidden": 6})


def test_images_beside_shards_are_counted(tmp_path, capsys):
    from feature_run import write_raw

    write_raw(tmp_path / "set" / "a.tar", [{"key": "0", "png": b"0"}, {"key": "1", "png": b"1"}])
    picture(0).save(tmp_path / "set" / "0.png")
    images = open_reference(str(tmp_path / "set"), run=tmp_path, cache=tmp_path / "cache")
    assert (images.num_images, dict(images.left_out)) == (2, {"beside the shards": 1})
    assert "files left out: 1 beside the shards" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("resized_to", "num_resized", "cropped", "num_cropped"),
    [
        ((16, 16), 10, "none", 0),
        (16, 10, "oblong", 7),
        (20, 5, "all", 12),
        ((20, 20), 12, "all", 12),
        (None, 0, "all", 12),
    ],
    ids=["squashed", "to a square", "larger than the crop", "squashed larger than the crop", "crop alone"],
)
def test_sizes_say_what_was_resized_and_cropped(resized_to, num_resized, cropped, num_cropped):
    counts = {(16, 16): 2, (64, 64): 3, (30, 20): 4, (20, 30): 3}
    sizes = SetSizes(target=(16, 16), counts=counts, resized_to=resized_to, cropped=cropped)
    assert (sizes.num_images, sizes.num_resized, sizes.num_cropped) == (12, num_resized, num_cropped)
    found = sizes.as_json()
    assert (found["to"], found["num_sizes"]) == ("16x16", 4)
    assert found["most_frequent"] == {"30x20": 4, "20x30": 3, "64x64": 3, "16x16": 2}


def features_of(folder: Path, clip_folder: Path, cache: Path, *, max_reject_fraction: float = 0.01) -> Features:
    config = EvaluationConfig(clip=str(clip_folder), max_reject_fraction=max_reject_fraction)
    engine = EngineConfig(in_process=True, samples_per_slice=2)
    (network,) = find_networks(config)
    return compute_features(open_folder(folder, cache=cache), network, cache=cache, config=config, engine=engine)


def without_sizes(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.select(["key", "feature", "clip_score", "reject", "detail"]), path)


@pytest.mark.parametrize(
    ("size", "do_resize", "expected"),
    [
        ({"shortest_edge": 256}, True, 256),
        ({"height": 20, "width": 30}, True, (30, 20)),
        ({"longest_edge": 9}, True, 9),
        ({"shortest_edge": 9}, False, None),
    ],
)
def test_a_processor_says_what_images_are_resized_to_before_the_crop(clip_folder, tmp_path, size, do_resize, expected):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    path = folder / "preprocessor_config.json"
    crop = {"height": 224, "width": 224}
    changed = {"size": size, "do_resize": do_resize, "crop_size": crop}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    (network,) = find_networks(EvaluationConfig(clip=str(folder)))
    assert network.resized_to == expected and network.cropped == "all"


def test_features_know_the_sizes_of_usable_images(tmp_path, clip_folder):
    (tmp_path / "set").mkdir()
    for number, (width, height) in enumerate([(16, 16), (30, 20), (30, 20), (40, 40)]):
        picture(number, width=width, height=height).save(tmp_path / "set" / f"{number}.png")
    (tmp_path / "set" / "broken.png").write_bytes(b"no picture")
    features = features_of(tmp_path / "set", clip_folder, tmp_path / "cache", max_reject_fraction=0.5)
    sizes = features.sizes()
    assert sizes is not None and dict(sizes.counts) == {(16, 16): 1, (30, 20): 2, (40, 40): 1}
    assert (sizes.target, sizes.cropped, sizes.num_resized, sizes.num_cropped) == ((16, 16), "oblong", 3, 2)
    # Features of before sizes were written down stay good.
    without_sizes(features.folder / "images.parquet")
    again = features_of(tmp_path / "set", clip_folder, tmp_path / "cache", max_reject_fraction=0.5)
    assert again.folder == features.folder and again.sizes() is None
    assert len(again.embeddings()) == 4


def test_parts_of_an_interrupted_run_of_before_are_joined(tmp_path, clip_folder):
    (tmp_path / "set").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "set" / f"{number}.png")
    features = features_of(tmp_path / "set", clip_folder, tmp_path / "cache")
    new, old = features.folder / "images.parquet", tmp_path / "old.parquet"
    old.write_bytes(new.read_bytes())
    without_sizes(old)
    FeatureWorker.join([{".parquet": old}, {".parquet": new}], {".parquet": tmp_path / "joined.parquet"})
    joined = pq.read_table(tmp_path / "joined.parquet")
    assert joined["key"].to_pylist() == ["0.png", "1.png", "2.png"] * 2
    assert joined["width"].to_pylist()[:3] == [None] * 3 and None not in joined["width"].to_pylist()[3:]


@pytest.fixture(scope="module")
def scored(tmp_path_factory, clip_folder):
    """Give a run that is scored, with one prompt of three longer than its CLIP reads, against a folder of samples."""
    run = make_run(tmp_path_factory.mktemp("scored") / "one")
    rows = [PROMPTS[0], PROMPTS[2], {"key": "long", "prompt": LONG}]
    (run / "raw" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = write_samples(run.parent / "reference", ["a star"] * 4)
    (reference / "mine.png").write_bytes(b"no sample of ours")
    evaluate(run, clip_folder)
    evaluate(run, clip_folder, task="curve", guidance_scales=[1.0, 2.0])
    return run


def cut_of(prompts: list[str], clip_folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    lengths = [len(AutoTokenizer.from_pretrained(clip_folder)(prompt).input_ids) for prompt in prompts]
    beyond = [length - 40 for length in lengths if length > 40]
    return {
        "max_tokens": 40,
        "num_texts": len(prompts),
        "num_cut": len(beyond),
        "num_tokens": sum(lengths),
        "num_tokens_cut": sum(beyond),
    }


def test_prompts_that_clip_does_not_read_to_the_end_stand_beside_its_score(scored, clip_folder):
    folder = scored / "evaluation" / "stage2"
    numbers = json.loads((folder / "scores.json").read_text())["checkpoints"][0]["numbers"]
    (score,) = [number for number in numbers if number["metric"] == "CLIP score"]
    expected = cut_of([PROMPTS[0]["prompt"], PROMPTS[2]["prompt"], LONG], clip_folder)
    assert score["prompts"] == expected and expected["num_cut"] == 1
    said = (
        f"CLIP score: 1 of 3 prompts are longer than the 40 tokens that this CLIP reads, which sees only their start: "
        f"{expected['num_tokens_cut']} of {expected['num_tokens']} tokens are cut off"
    )
    assert said in (folder / "scores.md").read_text()
    assert [number["prompts"] for number in numbers if number["metric"] != "CLIP score"] == [None, None]
    with (scored / "evaluation" / "stage2-curve" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["num_prompts"], row["prompts_cut_by_clip"], row["num_reference"]) for row in rows] == [
        ("3", "1", "4")
    ] * 2
    assert said in (scored / "evaluation" / "stage2-curve" / "curve.html").read_text()


def test_resizing_and_what_is_left_out_stand_beside_a_distance(scored):
    folder = scored / "evaluation" / "stage2"
    value = json.loads((folder / "scores.json").read_text())
    assert value["inputs"]["reference"]["num_images"] == 4
    left_out = {"hidden": 1, "no image by its name": 1, "not one of its samples.parquet": 2}
    assert value["inputs"]["reference"]["left_out"] == left_out
    distance = value["checkpoints"][0]["numbers"][0]
    assert distance["metric"] == "CLIP-MMD" and distance["network_key"] == "clip"
    assert distance["sizes"]["reference"] == {
        "to": "16x16",
        "num_images": 4,
        "num_resized": 4,
        "num_cropped": 0,
        "num_sizes": 1,
        "most_frequent": {"20x20": 4},
    }
    assert distance["sizes"]["samples"]["num_images"] == 3
    counts = json.loads((scored / "summary.json").read_text())["evaluation_counts"]["stage2"]
    assert counts["CLIP-MMD"] == {"num_images": 3, "num_reference": 4, "rejected": {}}
    assert counts["CLIP score"]["prompts"]["num_cut"] == 1
    text = (folder / "scores.md").read_text()
    assert "- evaluation.clip, reference: 4 of 4 resized to 16x16, none cropped (they are 20x20)" in text
    assert "- evaluation.clip, stage 2, step 7: 3 of 3 resized to 16x16, none cropped (they are 32x32)" in text
    assert "(files left out: 1 hidden, 1 no image by its name, 2 not one of its samples.parquet)" in text

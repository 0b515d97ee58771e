"""Benchmarks' prompt files in their published layouts."""

import json

import pytest
from sampling_run import make_run

from errors import UserError
from sampling.evaluation.__main__ import main
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.prompt_sets import read_coco, read_compbench, write_prompt_set
from sampling.prompts import read_prompts


def write_compbench(folder):
    folder.mkdir()
    (folder / "color_val.txt").write_text("a green bench and a blue bowl\na blue bench and a green bowl\n\n")
    (folder / "color_train.txt").write_text("a black cat\n")
    (folder / "complex_val.txt").write_text("The soft pillow was on the hard floor.\tspatial\n")
    return folder


def write_coco(path, *, num_images=20):
    # As published: several captions an image, in no order, some with line ends.
    annotations = [
        {"image_id": 100 + image, "id": 1000 * number + image, "caption": f"caption {number} of\n {image} "}
        for number in (2, 1, 3)
        for image in range(num_images)
    ]
    images = [{"id": 100 + image, "file_name": f"COCO_val2014_{100 + image:012d}.jpg"} for image in range(num_images)]
    path.write_text(json.dumps({"info": {}, "images": images, "licenses": [], "annotations": annotations}))
    return path


def test_compbench_is_read_by_category_in_the_papers_order(tmp_path):
    folder = write_compbench(tmp_path / "dataset")
    rows = read_compbench(folder)
    assert rows == [
        {"key": "color-0000", "prompt": "a green bench and a blue bowl"},
        {"key": "color-0001", "prompt": "a blue bench and a green bowl"},
        {"key": "complex-0000", "prompt": "The soft pillow was on the hard floor."},
    ]
    assert [row["key"] for row in read_compbench(folder, num_per_category=1)] == ["color-0000", "complex-0000"]


def test_coco_gives_one_caption_an_image_and_the_same_ones_everywhere(tmp_path):
    path = write_coco(tmp_path / "captions_val2014.json")
    rows = read_coco(path, num_prompts=5)
    # A hash of ids chooses them, so these never change.
    assert [row["key"] for row in rows] == [f"{image:012d}" for image in (117, 100, 101, 116, 107)]
    assert all(row["prompt"] == f"caption 1 of {int(row['key']) - 100}" for row in rows)
    assert len({row["key"] for row in read_coco(path, num_prompts=20)}) == 20


def test_sampling_reads_what_is_written(tmp_path):
    write_compbench(tmp_path / "dataset")
    config = EvaluationConfig(prompt_set="t2i-compbench", prompts="{run}/dataset")
    path = write_prompt_set(config, run=tmp_path)
    before = path.stat().st_mtime_ns
    assert [prompt.key for prompt in read_prompts(path, seed=0)] == ["color-0000", "color-0001", "complex-0000"]
    assert write_prompt_set(config, run=tmp_path).stat().st_mtime_ns == before
    assert write_prompt_set(EvaluationConfig(), run=tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not COCO's captions"),
        ('{"images": []}', "is not COCO's captions"),
        ('{"annotations": [{"id": 1, "image_id": 2}]}', "is not COCO's captions"),
        ('{"annotations": [{"id": 1, "image_id": 2, "caption": " "}]}', "the caption of image 2 is empty"),
        ('{"annotations": []}', "has captions of 0 images, 1 are asked for"),
        (b"caf\xe9", "is not UTF-8"),
    ],
)
def test_a_bad_coco_file_is_refused(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"evaluation\.prompts .*captions\.json.*{message}"):
        read_coco(path, num_prompts=1)


def test_missing_or_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of color_val\.txt.*examples/dataset"):
        read_compbench(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"captions_val2014\.json"):
        read_coco(tmp_path / "none.json", num_prompts=1)
    (tmp_path / "shape_val.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"shape_val\.txt holds no prompt"):
        read_compbench(tmp_path)
    with pytest.raises(ValueError, match=r"needs evaluation\.prompts"):
        EvaluationConfig(prompt_set="coco")


def test_without_prompts_eval_names_what_it_takes_and_not_a_prompt_alone(tmp_path):
    run = make_run(tmp_path / "one")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[sampling]\nprompt = "one image of make sample"\n')
    with pytest.raises(UserError, match=r"^sampling\.prompts is not set: type (PROMPTS=|--prompts )…, or set eval"):
        main(["score", "--recipe", str(recipe), "--run", str(run), "--stage", "2"])

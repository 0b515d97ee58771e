"""Prompt files, seeds, sizes and files of requests."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from errors import UserError
from sampling.config import SamplingConfig
from sampling.prompts import class_prompts, read_prompts, single_prompt
from sampling.requests import make_requests
from sampling.trained_model import TrainedModel

TRAINED = TrainedModel(
    name="stage 3, step 1",
    kind="pixart",
    model_path=Path("model"),
    identity="x",
    num_classes=None,
    resolution=64,
    patch_pixels=16,
    buckets=((32, 128), (48, 96), (64, 64), (96, 48)),
    text=None,
    vae={},
    process={},
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_txt_gives_one_prompt_per_line_and_keys_that_do_not_depend_on_their_order(tmp_path):
    first = read_prompts(write(tmp_path / "a.txt", "a red fox\n\n  Ein Füchslein \n"), seed=3)
    second = read_prompts(write(tmp_path / "b.txt", "something else\nEin Füchslein\na red fox\n"), seed=3)
    assert [prompt.text for prompt in first] == ["a red fox", "Ein Füchslein"]
    assert first[0] == second[2] and first[1] == second[1]
    assert first[0].key.startswith("a-red-fox-")
    assert first[0].seed != first[1].seed


def test_jsonl_gives_keys_and_aspect_ratios(tmp_path):
    lines = [
        {"key": "k0", "prompt": "a\u2028b", "aspect_ratio": 1.5, "scene": {"any": 1}},
        {"prompt": "no key", "aspect_ratio": 2},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    first, second = read_prompts(write(tmp_path / "p.jsonl", text), seed=0)
    assert (first.key, first.text, first.aspect_ratio) == ("k0", "a\u2028b", 1.5)
    assert second.key.startswith("no-key-") and second.aspect_ratio == 2.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', r"p\.jsonl:2 has no text"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', r"p\.jsonl:2 is not JSON"),
        ("p.jsonl", '["a"]\n', r"p\.jsonl:1 has no text"),
        ("p.jsonl", '{"prompt": "a", "key": "../x"}\n', r"p\.jsonl:1: key '\.\./x' cannot name a file"),
        ("p.jsonl", '{"prompt": "a", "aspect_ratio": 0}\n', r"aspect_ratio 0 is not a positive number"),
        ("p.jsonl", '{"prompt": "a", "key": "grid"}\n', r"key 'grid' cannot name a file"),
        ("p.jsonl", '{"prompt": "a", "key": "%s"}\n' % ("k" * 201), r"cannot name a file"),
        (
            "p.jsonl",
            '{"key": "k", "prompt": "a"}\n{"key": "k", "prompt": "b"}\n',
            r"p\.jsonl:2 repeats key 'k' of line 1",
        ),
        ("p.txt", "a fox\na cat\na fox\n", r"p\.txt:3 repeats key 'a-fox-.*' of line 1: .* set N"),
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.parquet", "PAR1 and no table", r"p\.parquet cannot be read as Parquet"),
        ("p.csv", "a\n", "none of .txt, .jsonl and .parquet"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / name, content), seed=0)


def test_parquet_has_the_columns_of_jsonl(tmp_path):
    columns = {
        "key": ["k", None],
        "caption": ["a fox", "a cat"],
        "aspect_ratio": [2.0, None],
        "prompt": ["Describe"] * 2,
    }
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path)
    first, second = read_prompts(path, seed=0, column="caption")
    assert (first.key, first.text, first.aspect_ratio) == ("k", "a fox", 2.0)
    assert second == read_prompts(write(tmp_path / "p.txt", "a cat"), seed=0)[0]
    with pytest.raises(UserError, match=r"has no column 'text'; it has key, caption, aspect_ratio, prompt"):
        read_prompts(path, seed=0, column="text")
    pq.write_table(pa.table({"prompt": ["a fox", None]}), path)
    with pytest.raises(UserError, match=r"p\.parquet:2 has no text"):
        read_prompts(path, seed=0)


def test_blank_lines_are_named(tmp_path, capsys):
    assert len(read_prompts(write(tmp_path / "p.txt", "a fox\n\n \na cat\n\n"), seed=0)) == 2
    assert "blank lines are left out: 2, 3" in " ".join(capsys.readouterr().err.split())


def test_binary_and_missing_files_are_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="as UTF-8 text"):
        read_prompts(tmp_path / "p.txt", seed=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_prompts(tmp_path / "none.txt", seed=0)


def test_images_of_a_prompt_are_seeds_in_a_row():
    config = SamplingConfig(images_per_prompt=3, seed=2**32 - 2)
    requests = make_requests([single_prompt("a fox!", seed=config.seed)], config, TRAINED)
    assert [request.seed for request in requests] == [2**32 - 2, 2**32 - 1, 0]
    key = requests[0].key
    assert [request.file for request in requests] == [f"{key}.png", f"{key}-1.png", f"{key}-2.png"]


def test_more_images_per_prompt_keep_the_first_one():
    prompt = single_prompt("a fox", seed=0)
    few = make_requests([prompt], SamplingConfig(), TRAINED)
    many = make_requests([prompt], SamplingConfig(images_per_prompt=4), TRAINED)
    assert few == many[:1]


@pytest.mark.parametrize(("ratio", "size"), [(1.0, (64, 64)), (9.0, (128, 32)), (1.9, (96, 48)), (0.4, (48, 96))])
def test_aspect_ratio_takes_the_nearest_trained_size(tmp_path, ratio, size):
    line = json.dumps({"key": "k", "prompt": "a", "aspect_ratio": ratio})
    (request,) = make_requests(read_prompts(write(tmp_path / "p.jsonl", line), seed=0), SamplingConfig(), TRAINED)
    assert (request.width, request.height) == size


def test_size_overrides_aspect_ratio_and_must_be_whole_patches():
    prompts = class_prompts([3], seed=0)
    (request,) = make_requests(prompts, SamplingConfig(size="80x48"), TRAINED)
    assert (request.width, request.height) == (80, 48)
    assert (request.label, request.key, request.prompt) == (3, "class_0003", "class 3")
    with pytest.raises(UserError, match=r"sampling\.size 100x64: 100 is not a positive multiple of 16"):
        make_requests(prompts, SamplingConfig(size="100x64"), TRAINED)
    with pytest.raises(UserError, match=r"sampling\.size 64x1000000: 1000000 is more than 32768 pixels a side"):
        make_requests(prompts, SamplingConfig(size="64x1000000"), TRAINED)
    with pytest.raises(ValueError, match="a size is width x height"):
        SamplingConfig(size=f"{'9' * 5000}x64")
    with pytest.raises(
        UserError, match=r"images_per_prompt = 10000000000000: of 1 prompts that is 10,000,000,000,000 im"
    ):
        make_requests(prompts[:1], SamplingConfig(images_per_prompt=10**13), TRAINED)


def test_images_never_share_a_file(tmp_path):
    lines = '{"key": "a", "prompt": "x"}\n{"key": "a-1", "prompt": "y"}\n'
    prompts = read_prompts(write(tmp_path / "p.jsonl", lines), seed=0)
    with pytest.raises(UserError, match=r"two images would be called a-1\.png"):
        make_requests(prompts, SamplingConfig(images_per_prompt=2), TRAINED)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_say_the_encoding_and_are_no_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("a red dog\r\nun café\r\n".encode(encoding))
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "a red dog"}'.encode(encoding))
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.txt", seed=0)] == ["a red dog", "un café"]
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.jsonl", seed=0)] == ["a red dog"]

"""RETRY=1, other limits and CLIP scores complete the captions that are there: no other row changes, kills included."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from captioning.__main__ import main
from captioning.engines.decoding import ContinuousDecoder
from captioning.worker import CaptionWorker
from errors import UserError
from pipelines.raw.images import SampleReject
from pipelines.raw.kinds.file_shard import FileShard
from pipelines.store.manifest import ShardDirectory, read_manifest
from pipelines.store.summary import read_summary
from tests.raw_shards import encode, laion_members, photo, write_laion, write_tar
from tests.tiny_models import save_clip, save_llava

RECIPE = """
[data]
shards = "{{run}}/raw/*.tar"
max_pixels = 20_000

[engine]
samples_per_slice = 4
in_process = true
num_workers = 2

[captioning]
model = "{model}"
max_new_tokens = 24
batch_size = 4
max_reject_fraction = 0.9
"""
LARGE = {3, 7}
RETRY = ("--set", "captioning.retry_rejects=true")
RAISED = ("--set", "data.max_pixels=1_000_000")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


def make_run(folder: Path, model: Path) -> Path:
    """Two shards of ten: one with two images over the limit, one of good images."""
    members = []
    for number in range(10):
        size = (200, 150) if number in LARGE else (40, 30)
        members += laion_members(f"{number:09d}", encode(photo(number, *size)), f"alt {number}")
    write_tar(folder / "raw" / "laion_00000.tar", members)
    write_laion(folder / "raw" / "laion_00001.tar", 10, first=100)
    (folder / "recipe.toml").write_text(RECIPE.format(model=model))
    return folder


def command(run: Path, *options: str, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run), *options])
    main()


def contents(run: Path) -> dict[str, bytes]:
    """Every byte of captions/ that is meant to stay, markers and manifest included."""
    folder = run / "captions"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.suffix in KEPT}


KEPT = {".parquet", ".json"}


def rows(run: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path).to_pylist() for path in sorted((run / "captions").glob("*.parquet"))]
    return [row for table in tables for row in table]


@pytest.fixture
def count_prompts(monkeypatch) -> list[int]:
    """How many captions each call of the decoder was asked for, the canary's apart."""
    counts: list[int] = []
    decode = ContinuousDecoder.decode

    def counting(self: ContinuousDecoder, prompts: Any, **options: Any) -> Any:
        results = decode(self, prompts, **options)
        if self._settings.max_new_tokens == 24 and options["repetition_penalty"] == 1.0:
            counts.append(len(results))
        return results

    monkeypatch.setattr(ContinuousDecoder, "decode", counting)
    monkeypatch.setattr("captioning.worker.check_engine", lambda *_: None)
    return counts


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, model) -> Path:
    """A run that had the higher limit from the start."""
    run = make_run(tmp_path_factory.mktemp("fresh"), model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(run, *RAISED, monkeypatch=monkeypatch)
    return run


@pytest.mark.parametrize("options", [RAISED, (*RAISED, *RETRY)])
def test_a_raised_limit_captions_what_it_lets_in_and_nothing_else(
    tmp_path, model, fresh, count_prompts, monkeypatch, options
) -> None:
    run = make_run(tmp_path, model)
    command(run, monkeypatch=monkeypatch)
    before = rows(run)
    assert read_manifest(run / "captions").rejected == {"too_many_pixels": 2}
    count_prompts.clear()
    command(run, *options, monkeypatch=monkeypatch)
    assert sum(count_prompts) == len(LARGE)
    assert contents(run) == contents(fresh), "the bytes of a run that knew the limit from the start"
    after = rows(run)
    assert [row for row in after if row["key"] not in {f"{n:09d}" for n in LARGE}] == [
        row for row in before if row["reject"] is None
    ]
    # And back again: what is over the limit loses its caption, without a model being asked.
    count_prompts.clear()
    command(run, monkeypatch=monkeypatch)
    assert rows(run) == before and sum(count_prompts) == 0
    assert not (run / "captions" / ".earlier").exists()


def test_retry_runs_rejects_again_and_counts_them_anew(tmp_path, model, fresh, count_prompts, monkeypatch) -> None:
    """A storage fault that was put right: nothing in the recipe has changed."""
    run = make_run(tmp_path, model)
    read, bad = FileShard.image_bytes, {"000000002", "000000105"}

    def failing(self: FileShard, sample: Any) -> bytes:
        if sample.key in bad:
            raise SampleReject("corrupt_image")
        return read(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(FileShard, "image_bytes", failing)
        command(run, *RAISED, monkeypatch=patch)
    assert read_manifest(run / "captions").rejected == {"corrupt_image": 2}
    count_prompts.clear()
    command(run, *RAISED, monkeypatch=monkeypatch)
    assert count_prompts == [], "without RETRY=1 a finished run is finished"
    command(run, *RAISED, *RETRY, monkeypatch=monkeypatch)
    assert sum(count_prompts) == 2 and contents(run) == contents(fresh)
    # Nothing is rejected any more, and nothing is tried again.
    count_prompts.clear()
    command(run, *RAISED, *RETRY, monkeypatch=monkeypatch)
    assert count_prompts == [] and contents(run) == contents(fresh)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(7))
def test_a_killed_retry_is_taken_up_again(tmp_path, model, fresh, count_prompts, monkeypatch, moment: int) -> None:
    """The process ends between any two steps; the next run, with RETRY=1 or without, ends with the same bytes."""
    run = make_run(tmp_path, model)
    command(run, monkeypatch=monkeypatch)
    steps = []

    def dying(owner: Any, name: str, patch: Any, *, after: bool) -> None:
        step = getattr(owner, name)

        def stepping(*arguments: Any, **options: Any) -> Any:
            steps.append(name)
            if len(steps) - 1 == moment and not after:
                raise Killed
            result = step(*arguments, **options)
            if len(steps) - 1 == moment and after:
                raise Killed
            return result

        patch.setattr(owner, name, stepping)

    with monkeypatch.context() as patch:
        patch.setattr("captioning.__main__.clear_earlier", lambda *_: None)
        dying(ShardDirectory, "clear_marker", patch, after=False)
        dying(ShardDirectory, "write_marker", patch, after=True)
        dying(CaptionWorker, "__call__", patch, after=True)
        with pytest.raises(Killed):
            command(run, *RAISED, *RETRY, monkeypatch=patch)
    count_prompts.clear()
    command(run, *RAISED, *(RETRY if moment % 2 else ()), monkeypatch=monkeypatch)
    assert contents(run) == contents(fresh)
    assert sum(count_prompts) <= len(LARGE), f"killed at {steps[-1]}: no caption that was there is made again"


def test_retry_does_not_caption_anew_what_was_made_under_other_settings(tmp_path, model, monkeypatch) -> None:
    run = make_run(tmp_path, model)
    command(run, monkeypatch=monkeypatch)
    before = contents(run)
    with pytest.raises(UserError, match=r"RETRY=1.*max_new_tokens is 24, but 12 is needed"):
        command(run, *RETRY, "--set", "captioning.max_new_tokens=12", monkeypatch=monkeypatch)
    assert contents(run) == before
    (run / "captions" / ".manifest.json").unlink()
    with pytest.raises(UserError, match=r"captions of laion_00000 were made under other settings"):
        command(run, *RETRY, "--set", "captioning.max_new_tokens=12", monkeypatch=monkeypatch)


def test_a_tar_that_changed_is_captioned_whole(tmp_path, model, fresh, count_prompts, monkeypatch) -> None:
    run = make_run(tmp_path, model)
    command(run, *RAISED, monkeypatch=monkeypatch)
    write_laion(run / "raw" / "laion_00001.tar", 10, first=500)
    count_prompts.clear()
    command(run, *RAISED, *RETRY, monkeypatch=monkeypatch)
    assert sum(count_prompts) == 10
    assert {row["key"] for row in rows(run)} >= {f"{number:09d}" for number in range(500, 510)}


def test_clip_scores_come_with_captions_or_after_them(tmp_path, model, fresh, count_prompts, monkeypatch) -> None:
    """Switched on later, CLIP scores the captions that are there; the bytes are those of a run that had it at once."""
    from transformers import AutoProcessor, CLIPModel

    clip = save_clip(tmp_path / "clip")
    option = ("--set", f"captioning.clip_model={clip}")
    scored = make_run(tmp_path / "scored", model)
    decoded: list[str] = []
    monkeypatch.setattr("captioning.loading.decode_image", counting_decoder(decoded))
    command(scored, *RAISED, *option, monkeypatch=monkeypatch)
    assert len(decoded) == 20 + num_looping(scored) + 1, "one look at each image, and the canary's"
    later = make_run(tmp_path / "later", model)
    shutil.copytree(fresh / "captions", later / "captions")
    count_prompts.clear()
    command(later, *RAISED, *option, monkeypatch=monkeypatch)
    assert sum(count_prompts) == 0 and contents(later) == contents(scored)
    assert [{**row, "clip_score": None} for row in rows(later)] == rows(fresh)
    # The score is the cosine of CLIP's own embeddings, of the first 77 tokens.
    reference, processor = CLIPModel.from_pretrained(clip).eval(), AutoProcessor.from_pretrained(clip)
    for row in rows(scored)[10:13]:
        image = Image.open(io.BytesIO(encode(photo(int(row["key"])))))
        inputs = processor(text=[row["caption_raw"]], images=image, return_tensors="pt", truncation=True, max_length=77)
        with torch.inference_mode():
            output = reference(**inputs)
        expected = float(output.image_embeds[0] @ output.text_embeds[0])
        assert row["clip_score"] == pytest.approx(expected, abs=2e-4)
    assert len({row["clip_score"] for row in rows(scored)}) > 10
    lengths = [
        len(processor.tokenizer(row["caption_raw"]).input_ids) for row in rows(scored) if row["clip_score"] is not None
    ]
    cut = read_summary(scored)["captioning"]["clip_score_captions"]
    assert (cut["num_texts"], cut["num_tokens"]) == (len(lengths), sum(lengths))
    assert cut["num_cut"] == sum(length > cut["max_tokens"] for length in lengths)
    assert cut == read_summary(later)["captioning"]["clip_score_captions"]
    # Switched off again: the scores go, the captions stay.
    command(later, *RAISED, monkeypatch=monkeypatch)
    assert contents(later) == contents(fresh) and sum(count_prompts) == 0


def counting_decoder(decoded: list[str]) -> Any:
    from pipelines.raw.images import decode_image

    def decode(data: bytes, *, max_pixels: int) -> Any:
        decoded.append("")
        return decode_image(data, max_pixels=max_pixels)

    return decode


def num_looping(run: Path) -> int:
    return sum(row["first_caption"] is not None for row in rows(run))


def test_the_settings_are_in_every_file_and_marker(fresh) -> None:
    for name in ("laion_00000", "laion_00001"):
        metadata = pq.read_schema(fresh / "captions" / f"{name}.parquet").metadata
        settings = json.loads(metadata[b"atelier.settings"])
        assert settings == {"max_pixels": 1_000_000, "max_aspect_ratio": 20.0, "clip_model": None}

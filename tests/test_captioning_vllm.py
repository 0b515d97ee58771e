"""The engine that holds vLLM in the job: what vLLM is loaded with and asked, what it refuses, how a killed job goes on.

vLLM is not installed here; `tests/vllm_module.py` has the names and signatures that are touched.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from captioning import __main__ as captioning
from captioning.canary import check_engine
from captioning.claims import __main__ as claims
from captioning.claims.in_vllm import VllmAsker
from captioning.config import CaptioningConfig
from captioning.engines.protocol import Caption, Refusal, Request
from captioning.engines.vllm_engine import VllmEngine, engine_arguments
from captioning.passes import lay_over
from captioning.worker import CaptionWorker
from encoders.weights import ModelSource
from errors import UserError
from pipelines.store.manifest import read_manifest
from tests.chat_server import requests
from tests.raw_shards import encode, laion_members, photo, write_tar
from tests.vllm_module import vllm_module

TOY = "toyworld/weights/llava"
RECIPE = f"""
[data]
shards = "{{run}}/raw/*.tar"

[engine]
samples_per_slice = 4
in_process = true
gpus_per_worker = 1.0

[captioning]
engine = "vllm"
model = "{TOY}"
max_new_tokens = 64

[captioning.vllm]
max_model_len = 4096
"""


@pytest.fixture
def vllm(monkeypatch) -> Any:
    """The module in vLLM's place."""
    module = vllm_module()
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", module.exceptions)
    return module


def config_of(**table: Any) -> CaptioningConfig:
    return CaptioningConfig.model_validate({"engine": "vllm", "model": TOY, **table})


def make_run(folder: Path) -> Path:
    """One shard of ten samples, with a red image that makes loops, an alt text that is refused and a broken file."""
    images = [photo(number, 64, 48) for number in range(10)]
    images[2] = Image.merge(
        "RGB",
        [photo(2, 64, 48).convert("L").point(lambda value: value // 4 + 190), *[Image.new("L", (64, 48), 20)] * 2],
    )
    members = []
    for number, image in enumerate(images):
        data = encode(image, "PNG")[: 60 if number == 5 else None]
        members += laion_members(f"{number:09d}", data, "refuse" if number == 7 else f"text {number}", extension="png")
    write_tar(folder / "raw" / "laion_00000.tar", members)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def command(
    run: Path, *settings: str, monkeypatch: pytest.MonkeyPatch, is_plan: bool = False, do: Any = captioning.main
) -> None:
    typed = ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run)]
    typed += [part for setting in settings for part in ("--set", setting)]
    monkeypatch.setattr("sys.argv", [*typed, *["--plan"] * is_plan])
    do()


def rows(run: Path) -> list[dict[str, Any]]:
    return pq.read_table(run / "captions" / "laion_00000.parquet").to_pylist()


def test_what_vllm_is_loaded_with() -> None:
    source = ModelSource("org/model", "abc", "org/model@abc")
    assert engine_arguments(config_of(), source) == {
        "model": "org/model",
        "revision": "abc",
        "tokenizer_revision": "abc",
        "dtype": "bfloat16",
        "seed": 0,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.9,
        "trust_remote_code": False,
        "limit_mm_per_prompt": {"image": 1},
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    of_recipe = {"tensor_parallel_size": 4, "max_model_len": 4096, "engine_args": {"quantization": "awq"}}
    found = engine_arguments(config_of(vllm=of_recipe, batch_size=64, dtype="float16"), source)
    assert (found["tensor_parallel_size"], found["distributed_executor_backend"]) == (4, "mp")
    assert (found["max_model_len"], found["max_num_seqs"], found["quantization"]) == (4096, 64, "awq")
    assert found["dtype"] == "float16"
    assert engine_arguments(config_of(device="cpu"), source)["dtype"] == "float32"


def test_what_is_asked_is_what_the_recipe_says(vllm) -> None:
    engine = VllmEngine(config_of(vllm={"image_short_side_pixels": 32}, max_new_tokens=20))
    asked = [dataclasses.replace(requests(1)[0], image=photo(1, 128, 64), prompt="a <image></s> dog <|im_end|> <b>")]
    [caption] = engine.caption(engine.prepare(asked), repetition_penalty=1.1)
    [([(image, prompt)], [params])] = vllm.calls
    assert image.size == (64, 32) and prompt.split() == ["a", "dog", "<b>"]
    assert (params.temperature, params.max_tokens, params.repetition_penalty, params.seed) == (0.0, 20, 1.1, None)
    # vLLM counts the token that ends a caption.
    assert isinstance(caption, Caption) and caption.finish_reason == "stop"
    assert caption.text.endswith("None") and caption.num_tokens == len(caption.text.split()) == 9
    sampled = VllmEngine(config_of(temperature=0.2, max_new_tokens=3))
    [caption] = sampled.caption(sampled.prepare(requests(1)))
    assert vllm.calls[-1][1][0].seed == 2**60 and vllm.calls[-1][1][0].temperature == 0.2
    assert caption == Caption(text="A picture of", num_tokens=3, finish_reason="length")


def test_one_that_vllm_refuses_costs_the_others_nothing(vllm, monkeypatch) -> None:
    engine = VllmEngine(config_of())
    alone = [engine.caption(engine.prepare([request]))[0] for request in requests(9)]
    asked = requests(9)
    asked[3] = dataclasses.replace(asked[3], prompt="refuse this")
    asked[8] = dataclasses.replace(asked[8], image=photo(0, 31, 40))
    found = engine.caption(engine.prepare(asked))
    refused = {index: caption for index, caption in enumerate(found) if isinstance(caption, Refusal)}
    assert refused.keys() == {3, 8} and {caption.reason for caption in refused.values()} == {"refused_by_engine"}
    assert "longer than the maximum model length" in refused[3].detail
    assert all(found[index] == alone[index] for index in range(9) if index not in refused)
    ended = dataclasses.replace(asked[0], prompt="x")
    monkeypatch.setattr(vllm, "answer", lambda *_: type("Output", (), {"finish_reason": "error"}))
    [refusal] = engine.caption(engine.prepare([ended]))
    assert isinstance(refusal, Refusal) and "'error'" in refusal.detail


def test_what_waits_in_memory_is_bounded(vllm, monkeypatch) -> None:
    monkeypatch.setattr("captioning.engines.vllm_engine.MAX_PIXELS_TOGETHER", 3 * 96 * 96)
    engine = VllmEngine(config_of())
    captions = engine.caption(engine.prepare(requests(8)))
    assert [len(asked) for asked, _ in vllm.calls] == [3, 3, 2]
    assert len({caption.text for caption in captions if isinstance(caption, Caption)}) == 8


def test_it_is_looked_at_before_the_first_caption(vllm) -> None:
    check_engine(VllmEngine(config_of()), photo(1, 96, 96), "Describe this image")
    assert all(params.temperature == 0.0 and params.max_tokens == 32 for _, given in vllm.calls for params in given)


def test_rows_rejects_second_tries_and_resume_are_those_of_every_engine(tmp_path, vllm, monkeypatch) -> None:
    calm = make_run(tmp_path / "calm")
    command(calm, "captioning.max_reject_fraction=0.5", monkeypatch=monkeypatch)
    found = rows(calm)
    assert [row["reject"] for row in found] == [
        *[None] * 5,
        "corrupt_image",
        None,
        "refused_by_engine",
        None,
        None,
    ], "of one slice, one is refused"
    assert found[2]["first_caption"].startswith("There is a red chair") and found[2]["flags"] == ["retried"]
    assert found[0]["caption"].startswith("A picture of ") and '"text 0"' in found[0]["prompt"]
    manifest = read_manifest(calm / "captions")
    assert manifest.extra["engine"] == "vllm" and manifest.extra["model"] == TOY
    assert manifest.fingerprint.fields["vllm"] == {"max_model_len": 4096}

    killed = make_run(tmp_path / "killed")
    step = CaptionWorker.__call__
    calls: list[Any] = []

    def dying(worker: CaptionWorker, piece: Any) -> Any:
        calls.append(piece)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(worker, piece)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CaptionWorker, "__call__", dying)
        command(killed, "captioning.max_reject_fraction=0.5", monkeypatch=patch)
    vllm.calls.clear()
    command(killed, "captioning.max_reject_fraction=0.5", monkeypatch=monkeypatch)
    name = "captions/laion_00000.parquet"
    assert (killed / name).read_bytes() == (calm / name).read_bytes()
    captioned = [prompt for asked, given in vllm.calls for _, prompt in asked if given[0].max_tokens == 64]
    assert captioned and not any('"text 0"' in prompt for prompt in captioned), "what was done is not asked again"

    num_loaded = len(vllm.loaded)
    command(
        calm,
        "captioning.max_reject_fraction=0.5",
        "captioning.vllm.gpu_memory_utilization=0.5",
        monkeypatch=monkeypatch,
    )
    assert len(vllm.loaded) == num_loaded, "a place, and no number"


def test_a_plan_says_how_many_gpus_a_worker_has(tmp_path, vllm, monkeypatch, capsys) -> None:
    run = make_run(tmp_path)
    two = ("captioning.vllm.tensor_parallel_size=2", "engine.gpus_per_worker=2.0")
    command(run, *two, monkeypatch=monkeypatch, is_plan=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "engine vllm, a LlavaForConditionalGeneration, by vLLM in each worker, 2 GPUs a worker" in said
    assert "as many as vLLM holds captions at a time" in said
    assert vllm.loaded == [] and not (run / "captions").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["engine.gpus_per_worker=0.5"], r"engine.gpus_per_worker is 0.5, .*tensor_parallel_size \(1\).*set it to 1"),
        (["captioning.vllm.tensor_parallel_size=2"], "engine.gpus_per_worker is 1, .*set it to 2"),
        (["captioning.device=cpu"], "none with captioning.device = 'cpu': set it to 0"),
        (["captioning.device=cuda:1"], "captioning.device = 'cuda:1', but vLLM takes the GPUs that the worker has"),
        (
            ['captioning.vllm.engine_args={dtype = "half"}'],
            "engine_args.*'dtype' is not said here: set captioning.dtype",
        ),
        (['captioning.vllm.engine_args={quantisation = "awq"}'], "has no argument for .did you mean quantization"),
        (
            ['captioning.vllm.engine_args={quantization = "none such"}'],
            "vLLM 0.29.0, .*Unknown quantization method: none such.$",
        ),
        (["captioning.model=no/such/model/here"], "no/such/model/here does not exist"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, vllm, monkeypatch, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command(make_run(tmp_path), *settings, monkeypatch=monkeypatch)


def test_without_vllm_the_extra_and_the_server_are_named(tmp_path, monkeypatch) -> None:
    """vLLM is in no environment of the tests: this is what everybody without it is told."""
    run = make_run(tmp_path)
    for is_plan in (True, False):
        with pytest.raises(
            UserError, match=r"install the extra `vllm`, .*\[captioning,vllm\].*captioning.engine = .openai."
        ):
            command(run, monkeypatch=monkeypatch, is_plan=is_plan)
    assert not (run / "captions").exists()


def test_claims_are_asked_by_the_likeliest_first_tokens(vllm) -> None:
    asker = VllmAsker(config_of(batch_size=32, max_new_tokens=1))
    assert vllm.loaded[0].max_num_seqs is None
    pictures = [asker.prepare(photo(n, 96, 96), questions) for n, questions in enumerate((["a", "refuse b"], ["c"]))]
    [first, second] = asker.supports(iter(pictures))
    assert second == [pytest.approx(0.9478, abs=1e-3)] and first == [*second, None]
    assert all(given[0].logprobs == 20 and given[0].max_tokens == 1 for _, given in vllm.calls)


def test_a_pass_changes_single_keys_of_vllm() -> None:
    laid = lay_over({"vllm": {"max_model_len": 4096}}, {"vllm": {"tensor_parallel_size": 2}})
    assert laid["vllm"] == {"max_model_len": 4096, "tensor_parallel_size": 2}


def test_prepare_keeps_what_needs_no_change(vllm) -> None:
    request = Request(image=photo(0, 40, 40), prompt="Describe this.", seed=5)
    [question] = VllmEngine(config_of()).prepare([request])
    assert question.image is request.image and (question.prompt, question.seed) == ("Describe this.", 5)


def test_the_claims_command_asks_vllm(tmp_path, vllm, monkeypatch) -> None:
    run = make_run(tmp_path)
    command(run, "captioning.max_reject_fraction=0.5", monkeypatch=monkeypatch)
    vllm.calls.clear()
    command(run, "captioning.max_reject_fraction=0.5", monkeypatch=monkeypatch, do=claims.main)
    found = pq.read_table(run / "columns" / "claims" / "laion_00000.parquet").to_pylist()
    asked = [row for row in found if row["reject"] is None]
    assert len(asked) == 8 and all(row["unsupported_share"] == 0.0 for row in asked)
    assert {given[0].logprobs for _, given in vllm.calls} == {20}
    assert read_manifest(run / "columns" / "claims").fingerprint.fields["vllm"] == {"max_model_len": 4096}


def test_loops_without_spaces_are_asked_again_where_the_recipe_says_so(tmp_path, vllm, monkeypatch) -> None:
    """By default not: captions that are there were made without it."""
    answer = vllm.answer

    def looping(image: Image.Image, prompt: str, params: Any) -> Any:
        found = answer(image, prompt, params)
        if params.max_tokens == 64 and params.repetition_penalty == 1.0:
            found.text = "桌子和椅子" * 20
        return found

    monkeypatch.setattr(vllm, "answer", looping)
    run = make_run(tmp_path)
    for by_script, flags in (("false", ["loop", "other_script"]), ("true", ["retried"])):
        settings = ("captioning.max_reject_fraction=0.5", f"captioning.loop_retry.by_script={by_script}")
        command(run, *settings, monkeypatch=monkeypatch)
        assert all(row["flags"] == flags for row in rows(run) if row["reject"] is None)

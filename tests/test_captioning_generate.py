"""The engine `generate` on tiny models of many kinds: captions of their own `generate`, whatever the batch."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Florence2Config,
    Florence2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from captioning.__main__ import main
from captioning.canary import check_engine
from captioning.config import DESCRIBE, CaptioningConfig
from captioning.engines.generate_engine import GenerateEngine
from captioning.engines.inputs import put_together
from captioning.engines.protocol import Caption, Request
from captioning.engines.transformers_engine import TransformersEngine
from captioning.worker import CaptionWorker, CaptionWorkerConfig
from errors import UserError
from pipelines.engine.pieces import Piece
from pipelines.engine.progress import console
from pipelines.raw.reading import AS_IT_COMES
from pipelines.raw.shards import shard_source
from tests.raw_shards import photo, write_laion
from tests.tiny_models import build_tokenizer, save_llava, text_config
from tests.tiny_vlms import save_idefics3, save_internvl, save_llava_onevision, save_qwen2_vl, save_smolvlm

PROMPTS = ["Hi", DESCRIBE, DESCRIBE + '. The image is known to have the following alt text: "Vintage poster 24x36"']
SAVES = {
    "idefics3": save_idefics3,
    "internvl": save_internvl,
    "llava_onevision": save_llava_onevision,
    "qwen2_vl": save_qwen2_vl,
    "smolvlm": save_smolvlm,
}


def load(folder: Path, **settings: Any) -> GenerateEngine:
    table = {"model": str(folder), "engine": "generate", "max_new_tokens": 40, "batch_size": 4, **settings}
    return GenerateEngine(CaptioningConfig.model_validate(table), num_threads=1)


def requests(num: int) -> list[Request]:
    """Images of many sizes, prompts of many lengths."""
    return [Request(image=photo(n, 20 + 7 * n, 30), prompt=PROMPTS[n % 3], seed=n) for n in range(num)]


def captions(engine: GenerateEngine, asked: list[Request], **settings: Any) -> list[Caption]:
    return engine.caption((image for image in engine.prepare(asked) if image is not None), **settings)


@pytest.fixture(scope="module", params=SAVES)
def folder(request, tmp_path_factory) -> Path:
    return SAVES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(folder) -> GenerateEngine:
    return load(folder)


def test_captions_are_those_of_generate_alone_and_together(folder, engine) -> None:
    """Settings for chatting in the published `generation_config.json` (Qwen2-VL samples) do not count."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    expected = []
    for request in requests(10):
        content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
        text = engine.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = engine.processor(
            images=request.image, text=text, return_tensors="pt", add_special_tokens="<s>" not in text
        )
        settings = {"do_sample": False, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
        output = model.generate(**inputs, **settings, max_new_tokens=40, pad_token_id=0)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        kept = [token for token in new if token not in ends]
        caption = engine.tokenizer.decode(kept, skip_special_tokens=True).strip()
        expected.append(
            Caption(text=caption, num_tokens=len(kept), finish_reason="stop" if len(kept) < len(new) else "length")
        )
    assert engine.batch_rows == 4
    assert captions(engine, requests(10)) == expected
    assert [captions(engine, [request])[0] for request in requests(10)] == expected
    assert len({caption.text for caption in expected}) > 5
    cut = captions(load(folder, max_new_tokens=6), requests(10))
    assert [caption.num_tokens for caption in cut] == [min(caption.num_tokens or 0, 6) for caption in expected]
    assert [caption.finish_reason == "length" for caption in cut] == [caption.num_tokens == 6 for caption in cut]
    assert {caption.finish_reason for caption in cut} == {"stop", "length"}


def test_sampling_and_penalties_depend_on_no_other_row(folder) -> None:
    engine = load(folder, temperature=0.8)
    asked = requests(9)
    for penalty in (1.0, 1.5):
        together = captions(engine, asked, repetition_penalty=penalty)
        assert together == captions(engine, asked[::-1], repetition_penalty=penalty)[::-1]
        assert together == [captions(engine, [request], repetition_penalty=penalty)[0] for request in asked]
        greedy = captions(load(folder), asked, repetition_penalty=penalty)
        assert together != greedy
        assert (
            greedy
            == [captions(load(folder), [request], repetition_penalty=penalty)[0] for request in asked[:1]] + greedy[1:]
        )
    assert captions(engine, asked, repetition_penalty=1.5) != captions(engine, asked)


def test_llava_gets_the_captions_of_the_engine_made_for_it(tmp_path) -> None:
    """Same draws from the same seeds, same penalty: the two engines differ in speed alone."""
    folder = save_llava(tmp_path)
    path = folder / "processor_config.json"
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    asked = requests(9)
    for temperature, penalty in ((0.0, 1.0), (0.0, 1.3), (0.9, 1.0), (0.9, 1.3)):
        table = {"model": str(folder), "max_new_tokens": 24, "temperature": temperature}
        own = TransformersEngine(CaptioningConfig.model_validate(table), num_threads=1)
        expected = own.caption((image for image in own.prepare(asked) if image is not None), repetition_penalty=penalty)
        engine = load(folder, max_new_tokens=24, temperature=temperature)
        assert captions(engine, asked, repetition_penalty=penalty) == expected


def test_the_canary_lets_sound_models_pass_and_prompts_hold_no_tokens_of_their_own(engine) -> None:
    check_engine(engine, photo(0), DESCRIBE)
    contents = [token.content for token in engine.tokenizer.added_tokens_decoder.values()]
    marks = "".join(content for content in contents if len(content) > 1)
    assert marks.count("<") > 6
    request = Request(image=photo(0), prompt=f'"{marks}dog"', seed=0)
    plain = Request(image=photo(0), prompt='" dog "', seed=0)
    texts = [engine.tokenizer.decode(engine.prepare([one])[0].inputs["input_ids"][0]) for one in (request, plain)]
    assert texts[0].replace(" ", "") == texts[1].replace(" ", "")


def test_a_prompt_that_leaves_no_room_for_a_caption_is_none(engine) -> None:
    context = engine.model.config.get_text_config().max_position_embeddings
    long = Request(image=photo(0), prompt="x" * context, seed=0)
    short, none = engine.prepare([requests(1)[0], long])
    assert short is not None and none is None


def test_batches_that_do_not_fit_the_memory_are_halved(folder, monkeypatch) -> None:
    engine = load(folder, batch_size=8)
    asked = requests(8)
    expected, sizes = captions(engine, asked), []
    generate = engine.model.generate

    def short_of_memory(**inputs: Any) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(engine.model, "generate", short_of_memory)
    assert captions(engine, asked) == expected and sizes == [8, 4, 2, 2, 2, 2]


def test_inputs_that_cannot_be_put_together_are_decoded_one_by_one(folder, engine, monkeypatch, caplog) -> None:
    """A processor that batches in a way of its own is found out at the start, and believed."""

    def askew(inputs: Any, *, pad_token_id: int) -> Any:
        batch = put_together(inputs, pad_token_id=pad_token_id)
        return {**batch, "pixel_values": batch["pixel_values"].roll(1, 0)} if len(inputs) > 1 else batch

    expected = captions(engine, requests(5))
    monkeypatch.setattr("captioning.engines.generate_engine.put_together", askew)
    cautious = load(folder)
    assert cautious.batch_rows == 1 and "pixel_values of a batch" in caplog.text
    assert captions(cautious, requests(5)) == expected


def test_inputs_of_single_images_in_a_batch() -> None:
    def single(length: int, tiles: int) -> dict[str, Any]:
        ids = torch.arange(1, length + 1)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.ones(1, tiles, 3)}

    batch = put_together([single(2, 3), single(4, 1)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[9, 9, 1, 2], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["pixel_values"].sum((1, 2)).tolist() == [9, 3] and batch["pixel_values"].shape == (2, 3, 3)
    with pytest.raises(ValueError, match="image_patches is not a tensor for each image"):
        put_together([single(2, 1) | {"image_patches": [1]}, single(2, 1) | {"image_patches": [1]}], pad_token_id=9)


def test_parts_of_a_shard_joined_are_the_whole(folder, tmp_path) -> None:
    """Neither workers nor kills decide what a slice holds, and so the bytes."""
    table = {"model": str(folder), "engine": "generate", "max_new_tokens": 16, "batch_size": 3, "temperature": 0.5}
    captioning = CaptioningConfig.model_validate(table)
    worker = CaptionWorker(
        CaptionWorkerConfig(captioning=captioning, reading=AS_IT_COMES, max_pixels=1_000_000, num_threads=1)
    )
    source = shard_source(str(write_laion(tmp_path / "laion_00000.tar", 12)))

    def run(start: int, stop: int, name: str) -> Path:
        piece = Piece(source=source, start=start, stop=stop, folder=tmp_path / name, samples_per_slice=6)
        assert worker(piece).num_kept == stop - start
        return piece.output(".parquet")

    parts = [{".parquet": run(start, start + 6, f"part{start}")} for start in (0, 6)]
    worker.join(parts, {".parquet": tmp_path / "joined.parquet"})
    assert (tmp_path / "joined.parquet").read_bytes() == run(0, 12, "whole").read_bytes()


def command(folder: Path, model: Path, *options: str, monkeypatch) -> str:
    """Run captioning as typed; returns what it prints."""
    write_laion(folder / "raw" / "laion_00000.tar", 6)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'[data]\nshards = "{{run}}/raw/*.tar"\n[engine]\nin_process = true\n[captioning]\nmodel = "{model}"\n'
    )
    monkeypatch.setattr("sys.argv", ["captioning", "--recipe", str(recipe), "--run", str(folder), *options])
    with console.capture() as said:
        main()
    return said.get()


def test_a_plan_says_which_engine_a_model_gets(folder, tmp_path, monkeypatch) -> None:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    said = command(tmp_path, folder, "--plan", "--set", "captioning.engine=generate", monkeypatch=monkeypatch)
    assert f"engine   generate, a {name}, on batches of prompts of about one length" in said
    refusal = rf'a {name}, but captioning.engine = "transformers" is for LLaVA.*set captioning.engine = "generate"'
    for option in ((), ("--plan",)):
        with pytest.raises(UserError, match=refusal):
            command(tmp_path, folder, *option, monkeypatch=monkeypatch)
    llava = save_llava(tmp_path / "llava")
    said = command(tmp_path, llava, "--plan", monkeypatch=monkeypatch)
    assert "engine   transformers, a LlavaForConditionalGeneration, with continuous batching" in said
    gemma = save_llava(tmp_path / "gemma", text="gemma")
    with pytest.raises(UserError, match=r"with gemma and clip_vision_model, but"):
        command(tmp_path, gemma, monkeypatch=monkeypatch)


def copy(folder: Path, target: Path, *, without: tuple[str, ...] = ()) -> Path:
    shutil.copytree(folder, target)
    for name in without:
        (target / name).unlink(missing_ok=True)
    return target


def save_florence2(folder: Path, target: Path) -> Path:
    """Write a random Florence-2 with the processor of the model in `folder`."""
    copy(folder, target, without=("model.safetensors",))
    vision = {"embed_dim": [8, 8, 8, 8], "num_heads": [1, 1, 1, 1], "num_groups": [1, 1, 1, 1], "depths": [1, 1, 1, 1]}
    text = {"vocab_size": 200, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
    text |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    config = Florence2Config(vision_config={**vision, "projection_dim": 8}, text_config=text)
    Florence2ForConditionalGeneration(config).save_pretrained(target)
    return target


def test_models_that_cannot_caption_are_refused_by_name(folder, tmp_path) -> None:
    named = r"captioning.model '.*"
    text = tmp_path / "text"
    LlamaForCausalLM(LlamaConfig(**text_config(40).to_diff_dict())).save_pretrained(text)
    build_tokenizer().save_pretrained(text)
    with pytest.raises(
        UserError, match=named + r"is a LlamaForCausalLM \(llama\), which transformers does not know as"
    ):
        load(text)
    mute = copy(folder, tmp_path / "mute", without=("chat_template.json", "chat_template.jinja"))
    with pytest.raises(UserError, match=named + r"has no chat template, and captioning.engine = 'generate'"):
        load(mute)
    wordy = copy(mute, tmp_path / "wordy")
    (wordy / "chat_template.jinja").write_text("{% for m in messages %}{{ 'USER: ' + m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match=r"the chat template of captioning.model '.*takes no images"):
        load(wordy)
    (wordy / "chat_template.jinja").write_text("Describe <image>")
    with pytest.raises(UserError, match=r"the chat template of captioning.model '.*leaves out what is asked"):
        load(wordy)
    encodes = save_florence2(folder, tmp_path / "encodes")
    with pytest.raises(UserError, match=named + r"is a Florence2ForConditionalGeneration, whose encoder reads the"):
        load(encodes)
    blind = copy(folder, tmp_path / "blind", without=("processor_config.json", "preprocessor_config.json"))
    with pytest.raises(UserError, match=named + r"(has no processor|comes with a .* without image_processor)"):
        load(blind)


def test_a_processor_that_needs_a_package_says_which(folder, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("Package `num2words` is required")

    monkeypatch.setattr("captioning.engines.processors._load", fail)
    with pytest.raises(UserError, match=r"processor of captioning.model .* not installed \(Package `num2words` is req"):
        load(folder)


def test_logits_that_are_not_finite_are_said(folder, monkeypatch) -> None:
    engine = load(folder)
    monkeypatch.setattr(engine.model.lm_head, "weight", torch.nn.Parameter(engine.model.lm_head.weight * torch.nan))
    with pytest.raises(UserError, match=r"captioning.dtype float32: the model's logits are not finite; the weights"):
        captions(engine, requests(2))

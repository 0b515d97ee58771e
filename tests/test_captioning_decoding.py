"""Continuous batching gives what `model.generate` gives one by one, whatever shares the batch."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from captioning.engines import decoding
from captioning.engines.decoding import GPU_PACE, ContinuousDecoder, Pace
from captioning.engines.graphs import padded_rows
from captioning.engines.llama import LlamaForward
from captioning.engines.rows import DecodingSettings, RowStates, TokenizedPrompt
from errors import UserError
from tests.tiny_models import IMAGE_PIXELS, save_llava

END, IMAGE, NUM_IMAGE_TOKENS = 2, 3, 16
GREEDY = DecodingSettings(num_slots=4, max_new_tokens=40, temperature=0.0, end_token_ids=frozenset([END]))


def alone(prompt: TokenizedPrompt) -> dict[str, torch.Tensor]:
    """What transformers takes for one prompt."""
    input_ids = prompt.input_ids[None]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **prompt.image_inputs}


def make_decoder(model: Any, settings: DecodingSettings, pace: Pace | None = None) -> ContinuousDecoder:
    return ContinuousDecoder(LlamaForward(model), settings, pace=pace)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    folder = save_llava(tmp_path_factory.mktemp("llava"))
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def prompts() -> list[TokenizedPrompt]:
    """24 prompts of 20 to 60 tokens, each with its own image."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(24):
        text = torch.from_numpy(rng.integers(4, 60, int(rng.integers(3, 43))))
        input_ids = torch.cat([torch.tensor([1]), torch.full((NUM_IMAGE_TOKENS,), IMAGE), text])
        pixels = torch.from_numpy(rng.normal(size=(1, 3, IMAGE_PIXELS, IMAGE_PIXELS)).astype(np.float32))
        made.append(TokenizedPrompt(input_ids=input_ids, image_inputs={"pixel_values": pixels}, seed=number))
    return made


@pytest.fixture(scope="module")
def generated(model, prompts) -> list[list[int]]:
    """New tokens of `model.generate`, one prompt at a time, without the end token."""
    outputs = []
    for prompt in prompts:
        inputs = alone(prompt)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=GREEDY.max_new_tokens)
        new = output[0, len(prompt.input_ids) :].tolist()
        outputs.append([token for token in new if token != END])
    return outputs


@pytest.mark.parametrize("num_slots", [1, 3, 8, 64])
def test_greedy_is_generate_whatever_shares_the_batch(model, prompts, generated, num_slots: int) -> None:
    lengths = [len(tokens) for tokens in generated]
    assert min(lengths) < 10 and max(lengths) == GREEDY.max_new_tokens, "the captions' lengths vary"
    decoder = make_decoder(model, dataclasses.replace(GREEDY, num_slots=num_slots))
    results = decoder.decode(iter(prompts))
    assert [result.token_ids for result in results] == generated
    reasons = ["length" if length == GREEDY.max_new_tokens else "stop" for length in lengths]
    assert [result.finish_reason for result in results] == reasons
    # Used again, shorter prompts first: slots hold the leftovers of longer ones.
    again = decoder.decode(sorted(prompts, key=lambda prompt: len(prompt.input_ids)))
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
    assert [result.token_ids for result in again] == [generated[index] for index in by_length]


PACES = [
    Pace(num_steps=3, num_ahead=0, pads_rows=False),
    GPU_PACE,
    Pace(num_steps=9, num_ahead=4, pads_rows=True),
]


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("num_slots", [1, 5, 64])
def test_rows_that_are_done_and_not_yet_seen_change_nothing(model, prompts, generated, num_slots: int, pace) -> None:
    """As on a GPU: looked at every few steps, the last of them under way, rows padded to few numbers of them."""
    settings = dataclasses.replace(GREEDY, num_slots=num_slots)
    results = make_decoder(model, settings, pace).decode(prompts)
    assert [result.token_ids for result in results] == generated
    sampled = dataclasses.replace(settings, temperature=0.8)
    options = {"repetition_penalty": 1.3}
    expected = make_decoder(model, sampled).decode(prompts, **options)
    assert make_decoder(model, sampled, pace).decode(prompts, **options) == expected


def test_steps_carry_few_numbers_of_rows() -> None:
    assert [padded_rows(rows, num_slots=96) for rows in (1, 4, 5, 9, 32, 33, 64, 65, 96)] == [
        *(4, 4, 8, 16, 32),
        *(64, 64, 96, 96),
    ]
    assert padded_rows(3, num_slots=3) == 3 and padded_rows(97, num_slots=104) == 104
    assert len({padded_rows(rows, num_slots=128) for rows in range(1, 129)}) == 7


def test_prompts_beyond_a_reading_are_read_in_packs(model, prompts, generated, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 100)
    sizes: list[int] = []
    prefill = LlamaForward.prefill

    def count(self, input_ids, *rest, **options):
        sizes.append(sum(len(ids) for ids in input_ids))
        return prefill(self, input_ids, *rest, **options)

    monkeypatch.setattr(LlamaForward, "prefill", count)
    results = make_decoder(model, dataclasses.replace(GREEDY, num_slots=64)).decode(prompts)
    assert [result.token_ids for result in results] == generated
    assert max(sizes) <= 100 and len(sizes) < len(prompts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("num_slots", [3, 64])
def test_greedy_is_generate_on_a_gpu_in_float32(prompts, num_slots: int, kind: str, tmp_path) -> None:
    """Graphs, the kernel of a token's attention and looks every few steps, twice: captured, then replayed."""
    model: Any = AutoModelForImageTextToText.from_pretrained(save_llava(tmp_path, text=kind)).eval().to("cuda")
    expected = []
    for prompt in prompts:
        inputs = {name: tensor.to("cuda") for name, tensor in alone(prompt).items()}
        output = model.generate(**inputs, do_sample=False, max_new_tokens=GREEDY.max_new_tokens)
        expected.append([token for token in output[0, len(prompt.input_ids) :].tolist() if token != END])
    decoder = make_decoder(model, dataclasses.replace(GREEDY, num_slots=num_slots))
    for _ in range(2):
        assert [result.token_ids for result in decoder.decode(prompts)] == expected
    other_pace = make_decoder(model, dataclasses.replace(GREEDY, num_slots=num_slots), PACES[0])
    assert [result.token_ids for result in other_pace.decode(prompts)] == expected
    # The cache grows, so that graphs are forgotten and captured again.
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
    growing = make_decoder(model, dataclasses.replace(GREEDY, num_slots=num_slots, max_new_tokens=24))
    for index in (by_length[0], by_length[-1], by_length[0]):
        assert growing.decode([prompts[index]])[0].token_ids == expected[index][:24]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_kernel_attends_as_torchs_operations_do(prompts, kind, dtype, tolerance, tmp_path, monkeypatch) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(save_llava(tmp_path, text=kind), dtype=dtype)
    forward = LlamaForward(model.eval().to("cuda"))
    pixels = {"pixel_values": torch.cat([prompt.image_inputs["pixel_values"] for prompt in prompts[:5]])}
    input_ids = [prompt.input_ids for prompt in prompts[:5]]
    lengths = torch.tensor([len(ids) for ids in input_ids], device="cuda")
    outputs = []
    for attend in (LlamaForward._attend_on_gpu, LlamaForward._attend_eagerly):
        monkeypatch.setattr(LlamaForward, "_attend_on_gpu", attend)
        cache = forward.make_cache(8)
        cache.reserve(100)
        with torch.inference_mode():
            forward.prefill(input_ids, pixels, cache, first_slot=0)
            logits = forward.step(lengths % 60, lengths, cache, longest=int(lengths.max()))
        outputs.append((logits, torch.stack(cache.keys), torch.stack(cache.values)))
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_sampling_depends_on_the_seed_and_on_nothing_else(model, prompts, generated) -> None:
    def sample(num_slots: int, chosen: list[TokenizedPrompt]) -> list[list[int]]:
        settings = dataclasses.replace(GREEDY, num_slots=num_slots, temperature=0.8)
        return [result.token_ids for result in make_decoder(model, settings).decode(chosen)]

    together = sample(8, prompts)
    assert together == sample(1, prompts)
    assert together[::-1] == sample(5, prompts[::-1])
    assert together != generated
    reseeded = [dataclasses.replace(prompt, seed=prompt.seed + 100) for prompt in prompts]
    assert together != sample(8, reseeded)


def test_sampling_follows_the_models_probabilities(model, prompts) -> None:
    """First tokens of one prompt under 2000 seeds have the frequencies of softmax(logits / temperature)."""
    settings = dataclasses.replace(GREEDY, num_slots=250, max_new_tokens=1, temperature=2.0)
    copies = [dataclasses.replace(prompts[0], seed=seed) for seed in range(2000)]
    results = make_decoder(model, settings).decode(copies)
    tokens = [result.token_ids[0] if result.token_ids else END for result in results]
    with torch.inference_mode():
        logits = model(**alone(prompts[0])).logits[0, -1]
    expected = torch.softmax(logits / 2.0, -1)
    found = torch.bincount(torch.tensor(tokens), minlength=len(expected)) / len(tokens)
    assert (found - expected).abs().max() < 0.04


def test_packed_prompts_read_as_each_alone(model, prompts) -> None:
    """No padding, and nothing seeps from one prompt into the next: logits are those of transformers' forward."""
    forward = LlamaForward(model)
    cache = forward.make_cache(8)
    cache.reserve(64)
    pixels = {"pixel_values": torch.cat([prompt.image_inputs["pixel_values"] for prompt in prompts[:5]])}
    with torch.inference_mode():
        logits = forward.prefill([prompt.input_ids for prompt in prompts[:5]], pixels, cache, first_slot=2)
        expected = torch.stack([model(**alone(prompt)).logits[0, -1] for prompt in prompts[:5]])
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert not cache.keys[0][:2].any() and cache.keys[0][2:7].any() and not cache.keys[0][7:].any()


def test_no_prompt_gives_no_caption(model) -> None:
    assert make_decoder(model, GREEDY).decode([]) == []


def test_prompts_are_taken_only_when_there_is_room(model, prompts) -> None:
    """The queue is never read further ahead than the slots: images wait in the loader, not in the decoder."""
    taken, most = 0, 0
    decoder = make_decoder(model, GREEDY)

    def queue():
        nonlocal taken, most
        for prompt in prompts:
            taken += 1
            finished = sum(result is not None for result in decoder._results)
            most = max(most, taken - finished)
            yield prompt

    decoder.decode(queue())
    assert taken == len(prompts) and most <= GREEDY.num_slots


def test_broken_weights_are_noticed(model, prompts) -> None:
    broken = dataclasses.replace(prompts[0], image_inputs={"pixel_values": torch.full((1, 3, 16, 16), torch.nan)})
    with pytest.raises(UserError, match=r"captioning.dtype float32: the model's logits are not finite; the weights"):
        make_decoder(model, GREEDY).decode([broken])


@pytest.mark.parametrize("num_slots", [1, 8])
def test_a_repetition_penalty_is_that_of_generate(model, prompts, generated, num_slots: int) -> None:
    """Tokens of the prompt count as said, image tokens too, whatever shares the batch; and the next call has none."""
    decoder = make_decoder(model, dataclasses.replace(GREEDY, num_slots=num_slots))
    results = decoder.decode(prompts[:12], repetition_penalty=1.3)
    for prompt, result in zip(prompts[:12], results, strict=True):
        inputs = alone(prompt)
        options = {"do_sample": False, "max_new_tokens": GREEDY.max_new_tokens, "repetition_penalty": 1.3}
        new = model.generate(**inputs, **options)[0, len(prompt.input_ids) :].tolist()
        assert result.token_ids == [token for token in new if token != END]
    assert [result.token_ids for result in results] != generated[:12]
    assert [result.token_ids for result in decoder.decode(prompts[:12])] == generated[:12]


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_other_llama_like_text_models_decode_as_generate_does(kind: str, prompts, tmp_path) -> None:
    """Grouped heads without biases, and with biases on queries, keys and values."""
    other: Any = AutoModelForImageTextToText.from_pretrained(save_llava(tmp_path, text=kind)).eval()
    for name, parameter in other.model.language_model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    results = make_decoder(other, GREEDY).decode(prompts[:8])
    for prompt, result in zip(prompts[:8], results, strict=True):
        inputs = alone(prompt)
        new = other.generate(**inputs, do_sample=False, max_new_tokens=40)[0, len(prompt.input_ids) :].tolist()
        assert result.token_ids == [token for token in new if token != END]


def test_a_text_model_of_another_kind_is_refused_by_name(tmp_path) -> None:
    other = AutoModelForImageTextToText.from_pretrained(save_llava(tmp_path, text="gemma")).eval()
    with pytest.raises(UserError, match=r'a GemmaModel .* others by "generate"'):
        LlamaForward(other)


def test_weights_laid_side_by_side_are_held_once(model) -> None:
    LlamaForward(model)
    attention = model.model.language_model.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1


def test_an_image_token_outside_the_vocabulary_is_never_said() -> None:
    prompt = TokenizedPrompt(input_ids=torch.tensor([1, 5, 5]), image_inputs={}, seed=0)
    states = RowStates(GREEDY, vocabulary=5, device=torch.device("cpu"))
    states.start(penalty=2.0)
    states.admit([prompt], torch.tensor([[0.0, 3.0, 2.0, 1.0, 0.0]]), first=0, limits=[4])
    assert states.tokens[0] == 0 and states._is_done[0], "1 is moved below 2, which ends the caption"

"""Continuous batching gives what `model.generate` gives one by one, whatever shares the batch."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from captioning.engines.decoding import ContinuousDecoder, DecodingSettings, TokenizedPrompt
from captioning.engines.llama import LlamaForward
from errors import UserError
from tests.tiny_models import IMAGE_PIXELS, save_llava

END, IMAGE, NUM_IMAGE_TOKENS = 2, 3, 16
GREEDY = DecodingSettings(num_slots=4, max_new_tokens=40, temperature=0.0, end_token_ids=frozenset([END]))


def alone(prompt: TokenizedPrompt) -> dict[str, torch.Tensor]:
    """What transformers takes for one prompt."""
    input_ids = prompt.input_ids[None]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **prompt.image_inputs}


def make_decoder(model: Any, settings: DecodingSettings) -> ContinuousDecoder:
    return ContinuousDecoder(LlamaForward(model), settings)


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
    with pytest.raises(UserError, match="logits are not finite"):
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
    with pytest.raises(UserError, match=r'a GemmaModel .* others by captioning.engine = "openai"'):
        LlamaForward(other)


def test_weights_laid_side_by_side_are_held_once(model) -> None:
    LlamaForward(model)
    attention = model.model.language_model.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1

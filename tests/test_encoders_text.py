import copy
import functools
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_encoders import save_codec, save_decoder, save_text_encoder
from transformers import Gemma2Model, T5Config, T5EncoderModel

from encoders.opening import open_text_encoder
from encoders.t5_packed import PackedT5
from encoders.text import clean_text, pack
from encoders.tokens import find_lost_words
from encoders.weights import resolve_model
from errors import UserError

TEXTS = ["a red circle", "", "Two BLUE squares on the left ", "x" * 70, "a small star, top", "a red circle"]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return str(save_text_encoder(tmp_path_factory.mktemp("t5")))


def load(folder, dtype="float32", batch_tokens=1024):
    return open_text_encoder(folder, max_tokens=40, dtype=dtype, batch_tokens=batch_tokens)


def test_only_real_tokens_come_back(text_folder):
    embeddings = load(text_folder).encode(TEXTS)
    # One token per character and the end of the sequence; the long one is cut at max_tokens.
    assert [len(embedding) for embedding in embeddings] == [13, 1, 29, 40, 18, 13]
    assert {embedding.shape[1] for embedding in embeddings} == {32}


def test_a_truncated_text_keeps_the_end_of_sequence_token(text_folder):
    (ids,) = load(text_folder).tokenize(["x" * 70])
    assert len(ids) == 40
    assert ids[-1] == 1


@pytest.mark.parametrize("batch_tokens", [1, 80, 1024])
def test_embeddings_do_not_depend_on_padding_or_batch(text_folder, batch_tokens):
    encoder = load(text_folder, batch_tokens=batch_tokens)
    alone = [encoder.encode([text])[0] for text in TEXTS]
    for single, batched in zip(alone, encoder.encode(TEXTS), strict=True):
        torch.testing.assert_close(batched, single, atol=1e-5, rtol=1e-5)


def test_embeddings_equal_those_of_transformers_padding_every_text_to_the_limit(text_folder):
    encoder = load(text_folder)
    model = T5EncoderModel.from_pretrained(text_folder)
    padded = encoder.tokenizer(
        [clean_text(text, "lower") for text in TEXTS],
        padding="max_length",
        max_length=40,
        truncation=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        hidden = model(padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state
    for row, embedding in enumerate(encoder.encode(TEXTS)):
        torch.testing.assert_close(embedding, hidden[row, : len(embedding)], atol=1e-5, rtol=1e-5)


def test_text_is_seen_as_diffusers_pipelines_see_it(text_folder):
    encoder = load(text_folder)
    assert clean_text(" A Red\n", "lower") == "a red"
    assert torch.equal(encoder.encode(["A Red CIRCLE "])[0], encoder.encode(["a red circle"])[0])


def test_bfloat16_is_near_float32(text_folder):
    exact = load(text_folder).encode(TEXTS)
    for short, long in zip(load(text_folder, "bfloat16").encode(TEXTS), exact, strict=True):
        assert short.dtype == torch.bfloat16
        torch.testing.assert_close(short.float(), long, atol=0.15, rtol=0.05)


def test_float16_text_is_refused_with_the_key_and_the_reason(text_folder):
    with pytest.raises(UserError, match=r"text_dtype float16.*overflow"):
        load(text_folder, "float16")


def test_a_full_t5_checkpoint_gives_its_encoder(tmp_path):
    folder = str(save_text_encoder(tmp_path / "full", is_full_model=True))
    assert load(folder).encode(["a red circle"])[0].shape == (13, 32)


def test_a_checkpoint_without_encoder_weights_is_refused(tmp_path):
    folder = str(save_text_encoder(tmp_path / "full", is_full_model=True))
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder)
    # The trap of lab and forum alike: this saves key names that T5EncoderModel does not know.
    model.encoder.save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"^features\.text_model .* lacks weights of a T5EncoderModel.* would stay random"
    ):
        load(folder)


def test_missing_model_folder_is_named():
    with pytest.raises(FileNotFoundError, match=r"\./no-such-model"):
        load("./no-such-model")


def test_a_text_batch_that_does_not_fit_is_halved_in_tokens(text_folder, monkeypatch):
    encoder = load(text_folder)
    expected = encoder.encode(TEXTS)
    shapes = []
    hidden_states = encoder.hidden_states

    def hungry(texts):
        shapes.append((len(texts.tokens), int(texts.is_real.sum(1).max())))
        if texts.tokens.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden_states(texts)

    monkeypatch.setattr(encoder, "hidden_states", hungry)
    found = encoder.encode(TEXTS)
    # The longest first, then as many as fit 40 tokens of the shortened budget.
    assert shapes == [(6, 40), (3, 40), (1, 40), (1, 29), (2, 18), (2, 13)]
    assert encoder.batches.size == 40
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_importing_encoders_loads_neither_torch_nor_transformers():
    code = "import sys, encoders.opening; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_is_complete_for_the_encoder_alone(text_folder):
    direct, packed = T5EncoderModel.from_pretrained(text_folder), load(text_folder).model
    assert torch.equal(direct.shared.weight, packed.embed.weight)
    # Key, query and value, and both halves of the gated layer, lie side by side; nothing is there twice or left out.
    assert sum(weight.numel() for weight in packed.parameters()) == sum(w.numel() for w in direct.parameters())


def random_t5(**settings):
    """A T5 of transformers with weights as training begins with them, in which each activation has its real scale."""
    torch.manual_seed(3)
    config = T5Config(vocab_size=64, d_model=128, d_kv=16, d_ff=320, num_heads=8, num_layers=6, **settings)
    model = T5EncoderModel(config).eval().requires_grad_(False)
    for block in model.encoder.block:
        for layer in block.layer:
            layer.layer_norm.weight.uniform_(0.5, 1.5)
    return model


def packed_states(model, texts, dtype=torch.float32):
    with torch.inference_mode():
        return PackedT5(copy.deepcopy(model).to(dtype))(texts).float()


def padded_states(model, texts, dtype=torch.float32):
    mask = texts.is_real.long()
    with torch.inference_mode():
        hidden = copy.deepcopy(model).to(dtype)(texts.input_ids[texts.tokens], attention_mask=mask).last_hidden_state
    return hidden[texts.is_real].float()


def random_texts():
    generator = torch.Generator().manual_seed(5)
    lengths = [150, 83, 40, 40, 17, 1]  # farther apart than the last bucket of distances begins
    return pack(
        [torch.randint(2, 64, (length,), generator=generator).tolist() for length in lengths],
        torch.device("cpu"),
        length_step=8,
    )


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu", "gated-silu"])
def test_packed_texts_give_what_transformers_gives_of_padded_ones(feed_forward):
    model, texts = random_t5(feed_forward_proj=feed_forward), random_texts()
    torch.testing.assert_close(packed_states(model, texts), padded_states(model, texts), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
def test_packed_bfloat16_is_no_farther_from_float32_than_that_of_transformers(feed_forward):
    model, texts = random_t5(feed_forward_proj=feed_forward), random_texts()
    exact = padded_states(model.to(torch.bfloat16).float(), texts)
    ours = (packed_states(model, texts, torch.bfloat16) - exact).square().mean().sqrt()
    theirs = (padded_states(model, texts, torch.bfloat16) - exact).square().mean().sqrt()
    assert 0 < ours <= theirs


def test_compiled_kernels_have_the_numbers_of_the_others(monkeypatch):
    # Without a compiler: what would be compiled is traced and run as it is.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, texts = random_t5(feed_forward_proj="gated-gelu"), random_texts()
    packed = PackedT5(copy.deepcopy(model))
    packed.compile_kernels()
    with torch.inference_mode():
        torch.testing.assert_close(packed(texts), packed_states(model, texts))


def test_a_decoder_gives_its_last_hidden_states_whatever_it_is_batched_with(tmp_path):
    folder = str(save_decoder(tmp_path / "gemma"))
    encoder = open_text_encoder(folder, max_tokens=40, dtype="float32")
    # No token is added, and a text of none is one token of padding.
    embeddings = encoder.encode(TEXTS)
    assert [len(embedding) for embedding in embeddings] == [12, 1, 28, 40, 17, 12]
    model = Gemma2Model.from_pretrained(folder).eval()
    for ids, embedding in zip(encoder.tokenize(TEXTS), embeddings, strict=True):
        with torch.inference_mode():
            alone = model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(embedding, alone, atol=1e-5, rtol=1e-5)
    assert (encoder.spec.width, encoder.spec.max_tokens) == (24, 40)


def test_cleaning_is_a_rule_of_the_spec(text_folder):
    texts = [" A Red\n", "a red"]
    ids = {}
    for rule in ("lower", "strip", "none"):
        encoder = open_text_encoder(text_folder, max_tokens=40, dtype="float32", cleaning=rule)
        assert encoder.spec.cleaning == rule
        ids[rule] = encoder.tokenize(texts)
    assert ids["lower"][0] == ids["lower"][1] == ids["strip"][1]
    # The tiny tokenizer knows no capitals, space or line break: what is left of a text shows in its length.
    assert [len(tokens) for tokens in (ids["strip"][0], ids["none"][0])] == [6, 8]
    assert ids["strip"][0] != ids["lower"][0]
    with pytest.raises(ValueError, match="cleaning upper is not one of lower, diffusers, strip, none"):
        clean_text("a", "upper")


@pytest.mark.parametrize("save", [save_text_encoder, save_decoder])
def test_what_is_cut_of_a_text_is_told(save, tmp_path):
    source = resolve_model(str(save(tmp_path / "encoder")))
    lost = find_lost_words(["A red kite", "x" * 12], source, max_tokens=8, cleaning="lower")
    # The end token of a T5 takes the eighth place.
    kept = 7 if save is save_text_encoder else 8
    assert {text: "".join(words.split()) for text, words in lost.items()} == {
        "A red kite": "".join("a red kite"[kept:].split()),
        "x" * 12: "x" * (12 - kept),
    }


def test_a_model_that_is_no_text_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"features\.text_model .* is a model of type None, not one of t5"):
        load(str(save_codec(tmp_path / "vae")))
    with pytest.raises(UserError, match=r"features\.text_model toyworld/weights/llava is .* type llava"):
        load("toyworld/weights/llava")


def test_a_model_without_weights_is_refused_by_what_it_is_called(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "t5")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^text encoder of stage 2 '.*t5' cannot be loaded: [^\n]*$"):
        open_text_encoder(str(folder), max_tokens=40, key="text encoder of stage 2")

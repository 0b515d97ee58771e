"""Tiny random text encoders and codecs for tests: the real classes, saved as a hub model would be."""

import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,'-"


def save_tokenizer(folder: Path, *, ends_texts: bool = True) -> int:
    """Write a tokenizer with one token per character and maybe `</s>` at the end; returns its number of tokens."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if ends_texts:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_pieces(folder: Path, texts: list[str]) -> None:
    """Write the tokenizer of a T5 as its publishers do: SentencePiece's file, learnt from `texts`, and settings."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def text_config(vocab_size: int) -> T5Config:
    return T5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )


def save_text_encoder(folder: Path, *, seed: int = 0, is_full_model: bool = False) -> Path:
    """Write a random T5 encoder with its tokenizer, or the whole T5 as hub repositories have it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = text_config(save_tokenizer(folder))
    model = T5ForConditionalGeneration(config) if is_full_model else T5EncoderModel(config)
    model.save_pretrained(folder)
    return folder


def save_codec(folder: Path, *, seed: int = 0) -> Path:
    """Write a random f8 VAE with 4 latent channels."""
    torch.manual_seed(seed)
    blocks = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        mid_block_add_attention=False,
        scaling_factor=0.45,
    )
    vae.save_pretrained(folder)
    return folder


def save_decoder(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Gemma 2 with its language head, as hub repositories have it; its tokenizer ends no text."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vocab_size = save_tokenizer(folder, ends_texts=False)
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def save_deep_codec(folder: Path, *, seed: int = 0) -> Path:
    """Write a random f16 autoencoder with 8 latent channels and no deviation."""
    torch.manual_seed(seed)
    widths, stages = (4, 8, 8, 16, 16), 5
    codec = AutoencoderDC(
        latent_channels=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * stages,
        decoder_layers_per_block=(1,) * stages,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    )
    codec.save_pretrained(folder)
    return folder

"""Byte-level BPE tokenizers of the toy world: any text round-trips, captions are short."""

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from toyworld.scenes import random_scene
from toyworld.wording import alt_text, dense_caption, describe

_NUM_TEXTS = 6000


def train_tokenizer(
    rng: np.random.Generator, *, vocab_size: int, special_tokens: list[str], extra_texts: list[str]
) -> Tokenizer:
    """A tokenizer fitted to captions, alt texts and `extra_texts`; the special tokens get the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(rng, extra_texts), trainer)
    return tokenizer


def _texts(rng: np.random.Generator, extra_texts: list[str]) -> Iterator[str]:
    for _ in range(_NUM_TEXTS):
        scene = random_scene(rng)
        yield dense_caption(scene, rng)
        yield describe(scene)
        yield alt_text(scene, rng)
    for text in extra_texts:
        yield from [text] * 200  # often enough that each becomes a handful of tokens

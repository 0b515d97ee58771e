"""The embedded T5EncoderModel, two layers of width 96, with its tokenizer; stands where a real run names Flan-T5-XXL.

It is trained on text alone: from a caption or prompt, its states must tell what the text puts at each anchor (`slots`;
the answers are the text's own parse). A T5 of this size with random weights is a bag of words, which a diffusion model
cannot tell apart into two objects. 4 minutes on one core.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from pipelines.engine.progress import get_logger
from toyworld.scenes import Scene, random_scene
from toyworld.wording import alt_text, dense_caption, describe, parse_background, parse_caption
from toyworld.zoo.optimizer import Trainer
from toyworld.zoo.saving import save_half
from toyworld.zoo.slots import SOMEWHERE, Probed, SlotReadout, SlotTargets, slot_accuracy, slot_loss, slot_targets
from toyworld.zoo.tokenizer import train_tokenizer

log = get_logger("toyworld.zoo")

SEED = 3
NUM_STEPS = 1500
BATCH_SIZE = 64
MAX_TOKENS = 120
_LEARNING_RATE = 3e-3
_WIDTH = 96
_VOCAB_SIZE = 768
_NUM_SLOTS = SOMEWHERE + 1


def build_tokenizer(rng: np.random.Generator) -> PreTrainedTokenizerFast:
    """A fast tokenizer with T5's special tokens; every text ends in </s>, so the empty one has one token."""
    backend = train_tokenizer(rng, vocab_size=_VOCAB_SIZE, special_tokens=["<pad>", "</s>", "<unk>"], extra_texts=[])
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build() -> T5EncoderModel:
    """The untrained encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=_VOCAB_SIZE,
            d_model=_WIDTH,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def random_text(rng: np.random.Generator) -> str:
    """What the encoder will be asked to read: captions, descriptions, short prompts and alt texts."""
    scene = random_scene(rng)
    scene = replace(scene, objects=tuple(scene.objects[i] for i in rng.permutation(len(scene.objects))))
    kind = rng.random()
    if kind < 0.45:
        return dense_caption(scene, rng)
    if kind < 0.7:
        return describe(scene)
    if kind < 0.85:
        return _short_prompt(scene, rng)
    return alt_text(scene, rng)


def _short_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A description as people type it: words, the background and sometimes capitals left out."""
    text = describe(scene)
    if rng.random() < 0.5:
        text = text[: text.rindex(", on a")]
    for word in ("small ", "large "):
        if rng.random() < 0.5:
            text = text.replace(word, "").replace("a orange", "an orange").replace("A orange", "An orange")
    if rng.random() < 0.2:
        text = text.replace("center", "centre")
    return text.lower() if rng.random() < 0.6 else text


def text_targets(texts: list[str]) -> SlotTargets:
    """What each text says, by its own parse."""
    grounds = [parse_background(text) for text in texts]
    return slot_targets([parse_caption(text) for text in texts], grounds, num_slots=_NUM_SLOTS)


def train(folder: Path) -> None:
    """Train tokenizer and encoder and save both to `folder`, fp16 on disk."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    tokenizer = build_tokenizer(rng)
    tokenizer.save_pretrained(folder)  # before its first call, whose padding it would remember
    probed = Probed(build(), SlotReadout(_WIDTH, num_slots=_NUM_SLOTS))
    trainer = Trainer(probed, num_steps=NUM_STEPS, learning_rate=_LEARNING_RATE)
    for step in range(NUM_STEPS):
        texts = [random_text(rng) for _ in range(BATCH_SIZE)]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        states = probed.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        logits = probed.readout(states, mask=tokens.attention_mask)
        targets = text_targets(texts)
        loss = slot_loss(logits, targets)
        trainer.step(loss)
        if (step + 1) % 100 == 0:
            accuracy = {k: round(v, 3) for k, v in slot_accuracy(logits, targets).items()}
            log.info("t5 step %d loss %.4f %s", step + 1, loss.item(), accuracy)
    save_half(trainer.averaged.encoder, folder)

"""The embedded LlavaForConditionalGeneration with its processor; stands where a real run names LLaVA-1.5-7B.

First its vision tower is warmed up (`vision_tower`, sees ground truth), then everything is trained to write the dense
caption of a picture, after the paper's prompt with or without an alt text. Alt texts are often wrong, so that the model
learns to trust the picture. 20 minutes on one core. After that `questions` teaches it to answer yes or no.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pipelines.engine.progress import get_logger
from toyworld.scenes import Scene, random_scene
from toyworld.wording import alt_text, caption_hits, dense_caption
from toyworld.zoo.optimizer import Trainer
from toyworld.zoo.saving import save_half
from toyworld.zoo.tokenizer import train_tokenizer
from toyworld.zoo.vision_tower import (
    IMAGE_MEAN,
    IMAGE_PIXELS,
    IMAGE_STD,
    picture_of,
    pixel_values,
    train_vision_tower,
    vision_config,
)

# B batch, T tokens of prompt and caption

log = get_logger("toyworld.zoo")

SEED = 2
LANGUAGE_SEED = 102
NUM_STEPS = 900
BATCH_SIZE = 32
MAX_NEW_TOKENS = 90
_LEARNING_RATE = 2e-3
_VOCAB_SIZE = 768
_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
_PAD, _BOS, _EOS, _IMAGE = 0, 1, 2, 4
_NO_LOSS = -100

_REQUEST = "Describe this image and its style in a very detailed manner"
_ALT_REQUESTS = (
    _REQUEST + '. The image is known to have the following alt text: "{}"',
    'Given the caption "{}", describe this image and its style in a very detailed manner',
    _REQUEST + ". Its alt text is: {}",
)
_OTHER_REQUESTS = ("Describe the image.", "What is shown in this picture?", "Describe this image in detail.")

# LLaVA-1.5's own template: images first, then the text, one space after each turn.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_processor(rng: np.random.Generator) -> LlavaProcessor:
    """Tokenizer, image processor (squashes the whole picture to 64x64, crops nothing) and chat template."""
    backend = train_tokenizer(
        rng,
        vocab_size=_VOCAB_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        extra_texts=["USER: \n", " ASSISTANT:", *_ALT_REQUESTS, *_OTHER_REQUESTS],
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", _BOS)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    size = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    image_processor = CLIPImageProcessor(
        size=size, do_center_crop=False, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=_CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build() -> LlavaForConditionalGeneration:
    """The untrained model: the vision tower, a projector and a Llama of four layers of width 128."""
    text_config = LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=_PAD,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
    )
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config,
        image_token_index=_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_PIXELS // 8) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = _PAD, _BOS, _EOS
    return model


def random_request(scene: Scene, rng: np.random.Generator) -> str:
    """What the captioner is asked: the paper's prompt, or that with an alt text, now and then something else."""
    kind = rng.random()
    if kind < 0.4:
        return _REQUEST
    if kind < 0.92:
        return _ALT_REQUESTS[rng.choice(len(_ALT_REQUESTS), p=(0.6, 0.2, 0.2))].format(alt_text(scene, rng))
    return _OTHER_REQUESTS[rng.integers(len(_OTHER_REQUESTS))]


def chat_text(processor: LlavaProcessor, request: str) -> str:
    """The request in the chat template, ready for the processor."""
    content: Any = [{"type": "image"}, {"type": "text", "text": request}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.no_grad()
def greedy_captions(model: Any, processor: Any, images: list[Image.Image], requests: list[str]) -> list[str]:
    """Captions by greedy decoding, through the shipped processor, in one left-padded batch."""
    texts = [chat_text(processor, request) for request in requests]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]


def train(folder: Path) -> None:
    """Train tower, projector and language model and save all to `folder`, fp16 on disk."""
    torch.manual_seed(SEED)
    tower = train_vision_tower(np.random.default_rng(SEED))
    torch.manual_seed(SEED)
    train_language(folder, tower_weights=tower.state_dict(), rng=np.random.default_rng(LANGUAGE_SEED))


def train_language(folder: Path, *, tower_weights: dict[str, Tensor], rng: np.random.Generator) -> None:
    """The second half: teach the whole model to write captions, starting from a warm tower."""
    processor = build_processor(rng)
    processor.save_pretrained(folder)  # before its first call, whose padding it would remember
    model = build()
    model.model.vision_tower.load_state_dict(tower_weights)
    trainer = Trainer(model, num_steps=NUM_STEPS, learning_rate=_LEARNING_RATE)
    for step in range(NUM_STEPS):
        loss = model(**training_batch(processor, rng)).loss
        trainer.step(loss)
        if (step + 1) % 100 == 0:
            hits = held_out_hits(trainer.averaged.eval(), processor)
            log.info("llava step %d loss %.4f hits %.3f", step + 1, loss.item(), hits)
    save_half(trainer.averaged, folder)


def training_batch(
    processor: LlavaProcessor, rng: np.random.Generator, *, batch_size: int = BATCH_SIZE
) -> dict[str, Tensor]:
    """Pictures, prompts and captions; the loss counts the caption and its end."""
    scenes = [random_scene(rng) for _ in range(batch_size)]
    image_tokens = "<image>" * (IMAGE_PIXELS // 8) ** 2
    tokens, labels = [], []
    for scene in scenes:
        prompt = chat_text(processor, random_request(scene, rng)).replace("<image>", image_tokens)
        asked = processor.tokenizer(prompt).input_ids
        said = processor.tokenizer(" " + dense_caption(scene, rng), add_special_tokens=False).input_ids
        said.append(_EOS)
        tokens.append(torch.tensor(asked + said))
        labels.append(torch.tensor([_NO_LOSS] * len(asked) + said))
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=_PAD)  # [B, T]
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != _PAD).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_NO_LOSS),
        "pixel_values": pixel_values([picture_of(scene, rng) for scene in scenes]),
    }


def held_out_hits(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> float:
    """Fraction of the objects of 32 held-out scenes that greedy captions name with shape, colour and position."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(32)]
    images = [picture_of(scene, rng) for scene in scenes]
    requests = [random_request(scene, rng) for scene in scenes]
    captions = greedy_captions(model, processor, images, requests)
    return float(np.mean([hit for s, text in zip(scenes, captions, strict=True) for hit in caption_hits(s, text)]))

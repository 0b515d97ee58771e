"""Tiny random vision-language models that are no LLaVA, saved as their makers publish them: Idefics3 and Qwen2-VL."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from tests.tiny_models import build_tokenizer, text_config

TURN = "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
TURN += (
    "{{% for content in message['content'] %}}{{{{ {image!r} if content['type'] == 'image' else content['text'] }}}}"
)
TURN += "{{% endfor %}}{{{{ '<end_of_utterance>\n' }}}}{{% endfor %}}"
TURN += "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"


def save_idefics3(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Idefics3, the architecture of SmolVLM: large images are cut into tiles of 16 pixels."""
    marks = {
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*marks.values(), "<|im_start|>", *tiles]})
    tokenizer.init_kwargs.update(marks)
    for name, token in marks.items():
        setattr(tokenizer, name, token)
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "initializer_range": 0.3,
    }
    text = {**text_config(len(tokenizer)).to_dict(), "max_position_embeddings": 1024}
    config: Any = Idefics3Config(vision_config=vision, text_config=text, scale_factor=2)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.tie_word_embeddings, config.pad_token_id = False, 0
    model: Any = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        model.model.connector.modality_projection.proj.weight.normal_(std=0.5)
    _end_often(model, ends=[2, tokenizer.convert_tokens_to_ids("<end_of_utterance>")])
    model.save_pretrained(folder)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    template = "<|im_start|>" + TURN.format(image="<image>").replace("'<|im_start|>' + ", "")
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(folder)
    return folder


def save_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Qwen2-VL, which sees images at their own size; with the files of the published ones.

    Its processor wants one for videos, too, which cannot be made without torchvision: so the files are written by hand.
    """
    # As published, without a name for the image token: the processor's own is used.
    backend = build_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="?")
    marks = [
        "<|im_start|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<end_of_utterance>",
    ]
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    ids: dict[str, Any] = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    torch.manual_seed(seed)
    text = text_config(len(tokenizer), kind="qwen2").to_dict()
    del text["model_type"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 32}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model: Any = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    # As published: settings for chatting, which captions have no use for, and two tokens that end an answer.
    _end_often(model, ends=[2, ids["<end_of_utterance>"]])
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1, top_p=0.001, repetition_penalty=1.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    images.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    path.write_text(json.dumps(settings, indent=2))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TURN.format(image=image)}))
    return folder


def _end_often(model: Any, *, ends: list[Any]) -> None:
    model.generation_config.eos_token_id = ends
    with torch.no_grad():
        model.lm_head.weight[ends] *= 1.4  # captions of many lengths end by themselves

"""Tiny random vision-language models that are not LLaVA-1.5, saved as their makers publish them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from tests.tiny_models import build_tokenizer, text_config

TURN = "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
TURN += (
    "{{% for content in message['content'] %}}{{{{ {image!r} if content['type'] == 'image' else content['text'] }}}}"
)
TURN += "{{% endfor %}}{{{{ '<end_of_utterance>\n' }}}}{{% endfor %}}"
TURN += "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDEFICS3_MARKS = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
IDEFICS3_TEMPLATE = "<|im_start|>" + TURN.format(image="<image>").replace("'<|im_start|>' + ", "")
IDEFICS3_SIZES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def save_idefics3(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Idefics3, the architecture of the first SmolVLM: large images are cut into tiles of 16 pixels."""
    tokenizer = _save_idefics3(folder, Idefics3Config, Idefics3ForConditionalGeneration, seed=seed)
    images = Idefics3ImageProcessorPil(**IDEFICS3_SIZES)
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS3_TEMPLATE).save_pretrained(folder)
    return folder


def save_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """Write a random SmolVLM2: an Idefics3 whose processor also takes videos, and needs num2words for them."""
    tokenizer = _save_idefics3(folder, SmolVLMConfig, SmolVLMForConditionalGeneration, seed=seed)
    images = SmolVLMImageProcessorPil(**IDEFICS3_SIZES)
    _save_processor(folder, "SmolVLMProcessor", tokenizer, images, template=IDEFICS3_TEMPLATE, image_seq_len=4)
    return folder


def _save_idefics3(folder: Path, config_class: Any, model_class: Any, *, seed: int) -> Any:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*IDEFICS3_MARKS.values(), "<|im_start|>", *tiles]})
    _name_tokens(tokenizer, IDEFICS3_MARKS)
    torch.manual_seed(seed)
    vision = {**VISION, "image_size": 16, "patch_size": 4, "initializer_range": 0.3}
    text = {**text_config(len(tokenizer)).to_dict(), "max_position_embeddings": 1024}
    config: Any = config_class(vision_config=vision, text_config=text, scale_factor=2)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.tie_word_embeddings, config.pad_token_id = False, 0
    model: Any = model_class(config)
    with torch.no_grad():
        model.model.connector.modality_projection.proj.weight.normal_(std=0.5)
    _end_often(model, ends=[2, tokenizer.convert_tokens_to_ids("<end_of_utterance>")])
    model.save_pretrained(folder)
    return tokenizer


def save_internvl(folder: Path, *, seed: int = 4) -> Path:
    """Write a random InternVL in transformers' own form: up to four tiles of 16 pixels, each of four tokens."""
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _published_tokenizer(["<|im_start|>", "<end_of_utterance>", "<video>", *marks.values()])
    _name_tokens(tokenizer, {**marks, "video_token": "<video>"})
    config = InternVLConfig(
        vision_config={**VISION, "image_size": (16, 16), "patch_size": (4, 4)},
        text_config=text_config(len(tokenizer), kind="qwen2").to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    torch.manual_seed(seed)
    _save_seeing(folder, InternVLForConditionalGeneration(config))
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4)
    template = TURN.format(image="<IMG_CONTEXT>")
    _save_processor(folder, "InternVLProcessor", tokenizer, images, template=template, image_seq_length=4)
    return folder


def save_llava_onevision(folder: Path, *, seed: int = 0) -> Path:
    """Write a random LLaVA-OneVision: tiles of 16 pixels, and of their tokens those of the padding left out."""
    tokenizer = _published_tokenizer(["<|im_start|>", "<end_of_utterance>", "<video>"])
    sizes = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4},
        text_config=text_config(len(tokenizer), kind="qwen2").to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=sizes,
    )
    torch.manual_seed(seed)
    _save_seeing(folder, LlavaOnevisionForConditionalGeneration(config))
    images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=sizes)
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    template = TURN.format(image="<image>")
    _save_processor(folder, "LlavaOnevisionProcessor", tokenizer, images, template=template, **settings)
    return folder


def save_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Qwen2-VL, which sees images at their own size; with the files of the published ones.

    Its processor wants one for videos, too, which cannot be made without torchvision: so the files are written by hand.
    """
    marks = [
        "<|im_start|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<end_of_utterance>",
    ]
    # As published, without a name for the image token: the processor's own is used.
    tokenizer = _published_tokenizer(marks)
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
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    template = TURN.format(image="<|vision_start|><|image_pad|><|vision_end|>")
    _save_processor(folder, "Qwen2VLProcessor", tokenizer, images, template=template)
    return folder


def _published_tokenizer(marks: list[str]) -> Any:
    backend = build_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="?")
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    return tokenizer


def _name_tokens(tokenizer: Any, names: dict[str, str]) -> None:
    tokenizer.init_kwargs.update(names)
    for name, token in names.items():
        setattr(tokenizer, name, token)


def _save_processor(folder: Path, name: str, tokenizer: Any, images: Any, *, template: str, **settings: Any) -> None:
    """Write the files of a processor that cannot be made here: its part for videos needs torchvision."""
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    image_class = type(images).__name__.removesuffix("Pil")
    found = json.loads(path.read_text()) | {"image_processor_type": image_class, "processor_class": name}
    path.write_text(json.dumps(found, indent=2))
    if settings:
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **settings}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def _save_seeing(folder: Path, model: Any) -> None:
    """Save a model whose captions tell images apart."""
    with torch.no_grad():
        for parameter in [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]:
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    _end_often(model, ends=[2])
    model.save_pretrained(folder)


def _end_often(model: Any, *, ends: list[Any]) -> None:
    model.generation_config.eos_token_id = ends
    with torch.no_grad():
        model.lm_head.weight[ends] *= 1.4  # captions of many lengths end by themselves

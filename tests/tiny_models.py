"""Tiny random LLaVA folders for tests: the real classes with a real processor, saved as a hub model would be."""

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
ALPHABET = string.ascii_letters + string.digits + " .,:;!?'\"()-\n"
IMAGE_PIXELS, PATCH_PIXELS = 16, 4
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] %}"
    "{{ '<image>\n' if content['type'] == 'image' else content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, `<s>` in front."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="?",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",  # wrong on purpose: the engine must not trust it
    )


TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "gemma": GemmaConfig}


def text_config(vocab_size: int, *, kind: str = "llama") -> PreTrainedConfig:
    return TEXT_CONFIGS[kind](
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.35,  # large, so that greedy captions vary with the image and end by themselves
        **({"sliding_window": None} if kind == "mistral" else {}),
        **({"head_dim": 8} if kind == "gemma" else {}),
    )


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
        projection_dim=16,
        initializer_range=0.3,
        initializer_factor=8.0,
    )


def save_llava(
    folder: Path, *, seed: int = 0, is_blind: bool = False, has_chat_template: bool = True, text: str = "llama"
) -> Path:
    """Write a random LLaVA; a blind one has a projector that gives the same features for every image."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(len(tokenizer), kind=text),
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    widen_features(model, is_blind=is_blind)
    model.save_pretrained(folder)
    size = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    # Wrong patch size and strategy on purpose, as hub repositories had them: the model's config decides.
    LlavaProcessor(
        CLIPImageProcessorPil(size=size, do_center_crop=False),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE if has_chat_template else None,
    ).save_pretrained(folder)
    return folder


def save_llava_next(folder: Path, *, seed: int = 0) -> Path:
    """Write a random LLaVA-NeXT, which cuts images into tiles by their aspect ratio."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    side = IMAGE_PIXELS
    tilings = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    config = LlavaNextConfig(
        vision_config=vision_config(),
        text_config=text_config(len(tokenizer)),
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=tilings,
        image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
    )
    model = LlavaNextForConditionalGeneration(config)
    widen_features(model, is_blind=False)
    model.save_pretrained(folder)
    size = {"shortest_edge": side}
    crop_size = {"height": side, "width": side}
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(size=size, crop_size=crop_size, image_grid_pinpoints=tilings),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write a random CLIP that reads 77 tokens, one per character."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        projection_dim=16,
        initializer_range=0.3,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    CLIPProcessor(CLIPImageProcessorPil(size=size, do_center_crop=False), tokenizer).save_pretrained(folder)
    return folder


def widen_features(model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration, *, is_blind: bool) -> None:
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        model.lm_head.weight[SPECIAL_TOKENS.index("</s>")] *= 1.4  # captions of many lengths end by themselves
        projector.linear_1.weight.normal_(std=1.0)
        projector.linear_2.weight.normal_(std=0.0 if is_blind else 0.5)
        projector.linear_2.bias.normal_(std=0.5)

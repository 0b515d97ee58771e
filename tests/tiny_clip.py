"""A tiny random CLIP folder for tests: both towers, tokenizer and image processor, saved as a hub model would be."""

from pathlib import Path

import torch
from tiny_models import build_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

IMAGE_PIXELS = 16
WIDTH = 12


def save_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write a CLIP with embeddings of width 12 for images of 16 pixels."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    shared = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    text = {**shared, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**shared, "image_size": IMAGE_PIXELS, "patch_size": 4, "initializer_factor": 8.0}
    config = CLIPConfig(text_config=text | tokens, vision_config=vision, projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size, crop = {"shortest_edge": IMAGE_PIXELS}, {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    CLIPImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    return folder

"""A random depth estimator for tests, laid out as Depth-Anything-V2-Small-hf is published."""

import json
from pathlib import Path

import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

# As published, but for the size, which is 518 there.
PREPROCESSOR = {
    "do_normalize": True,
    "do_pad": False,
    "do_rescale": True,
    "do_resize": True,
    "ensure_multiple_of": 14,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DPTImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "keep_aspect_ratio": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 70, "width": 70},
    "size_divisor": None,
}


def save_depth_model(
    folder: Path, *, seed: int = 0, depth_estimation_type: str = "relative", is_flat: bool = False
) -> Path:
    """Write the model with its preprocessor; a flat one gives one depth for whatever it sees."""
    torch.manual_seed(seed)
    backbone = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=24,
        neck_hidden_sizes=[8, 12, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
        initializer_range=0.3,
        depth_estimation_type=depth_estimation_type,
    )
    model = DepthAnythingForDepthEstimation(config)
    if is_flat:
        torch.nn.init.zeros_(model.head.conv3.weight)
    torch.nn.init.constant_(model.head.conv3.bias, 0.5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder

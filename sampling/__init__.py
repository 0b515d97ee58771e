"""Checkpoint and prompts to images: samplers, guidance, aspect ratios, grids."""

"""Scores of checkpoints: distances to a reference set, CLIP score, curves over guidance, blind preference."""

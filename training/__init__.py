"""Features to checkpoints: data plan, DeepSpeed loop, EMA and checkpoints of the paper's three stages (section 2.2)."""

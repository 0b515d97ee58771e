"""What is trained: named stages, their networks, where they start, their checkpoints."""

"""Benchmarks by questions: what prompts name, asked of a vision-language chat server about the images drawn."""

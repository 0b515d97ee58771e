"""Previews: what a stage's prompts or classes give by now, drawn while it trains and kept beside its checkpoints."""

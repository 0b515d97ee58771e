"""Ranks: where they run, how they start and end."""

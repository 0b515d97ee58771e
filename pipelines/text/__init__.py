"""Texts as language: where their sentences end, and how many words they have."""

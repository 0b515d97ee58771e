"""Columns per sample: expressions over them, where they are in a run, and choices made by them."""

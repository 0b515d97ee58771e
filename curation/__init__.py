"""Columns about samples, and the choice of those that are trained on."""

"""Shards to workers: local processes or Ray, pieces, progress."""

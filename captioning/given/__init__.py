"""Captions without a model: the samples' own texts, and tables of texts that are joined to samples by key."""

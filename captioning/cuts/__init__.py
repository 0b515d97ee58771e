"""Captions cut of others by rule, without a model: first sentences, or those whose claims are supported."""

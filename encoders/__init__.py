"""Frozen models that others use: text encoders, latent codecs, vision towers, chat servers."""

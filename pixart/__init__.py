"""The mathematics: PixArt and DiT transformers, diffusion, re-parameterisation and conversion of weights."""

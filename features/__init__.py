"""Captions and images to features: T5 embeddings and VAE latents, computed once (paper section 2.1, appendix A.5)."""

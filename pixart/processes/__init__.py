"""What noise does to latents, what the network predicts, and its loss."""

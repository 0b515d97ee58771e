"""What noise does to latents, what the network predicts, its loss and its schedule."""

"""The codec as a stage trains it: the network, its critic, its files, and what is measured of its latents."""

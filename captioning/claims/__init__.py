"""Captions asked back of a vision-language model, claim by claim: which sentences it does not see in the image."""

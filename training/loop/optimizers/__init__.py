"""What steps the masters: a file an optimizer."""

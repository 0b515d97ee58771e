"""`make choose`: which samples a table of features chooses, written down or shown on a page."""

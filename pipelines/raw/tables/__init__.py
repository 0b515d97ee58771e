"""Tables of every format as rows of named cells, and what their columns mean."""

"""Pictures of every format and colour space, as a browser shows them: RGB on white."""

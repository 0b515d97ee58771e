"""The kinds of raw shards: tars, folders, rows of images, and tables that name files."""

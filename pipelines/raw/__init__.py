"""Raw shards in: which there are, their samples in order, texts and pixels."""

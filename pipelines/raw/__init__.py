"""Raw shards in: members, headers, samples, pixels."""

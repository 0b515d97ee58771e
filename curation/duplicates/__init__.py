"""Near duplicates: proposed by hashes, confirmed in colour by thumbnails, grouped around representatives."""

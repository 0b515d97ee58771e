"""What captions talk about: distinct and valid nouns, nouns per image, and a report (paper, section 2.4, Table 1)."""

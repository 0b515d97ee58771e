"""What people look at: Table 1 as text, and the page with charts, nouns and images."""

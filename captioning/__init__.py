"""Raw shards to dense captions with a LLaVA (paper, section 2.4 and appendix A.4)."""

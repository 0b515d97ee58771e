"""The paper's claims in miniature: what `make paper` has trained and drawn, beside the paper's own figures."""

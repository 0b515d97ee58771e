"""What training reads: which features, in which order, and their bytes in the batch."""

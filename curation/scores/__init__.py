"""What is measured of samples: one score a file."""

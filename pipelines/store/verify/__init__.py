"""`make verify RUN=…`: whether every file of a run is the one that was written, and every sample accounted for."""

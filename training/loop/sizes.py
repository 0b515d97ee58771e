"""Sizes that the loop works in and that its memory is reckoned with; nothing here needs torch."""

# Weights that ranks share gradients of in one go, and that are whole at a time under ZeRO 3, at most.
MAX_EXCHANGED, MAX_GATHERED = 500_000_000, 1_000_000_000
# Elements of an average that are on the device at a time, where it lies elsewhere or is exchanged with masters, and of
# matrices that a rank orthogonalises at a time.
TAKEN_AT_ONCE = 1 << 24
# Elements that an update is made or measured by at a time, and what one takes beside the weights, in part in fp64.
# Compiled, it is one kernel that keeps nothing, and takes all at a time.
PIECE_SIZE = 1 << 20
STEPPED_BYTES = {"adamw": 32, "adamw8bit": 64, "muon": 20}  # of an element, where it is not compiled
# What an element of a matrix takes while it is orthogonalised, as sent and as received, in bf16.
ORTHOGONALIZED_BYTES = 14

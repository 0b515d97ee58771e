"""Sizes that the loop works in and that its memory is reckoned with; nothing here needs torch."""

# Weights that ranks share gradients of in one go, and that are whole at a time under ZeRO 3, at most.
MAX_EXCHANGED, MAX_GATHERED = 500_000_000, 1_000_000_000
# Elements that an update is measured by at a time: what it takes beside the weights is a few times as many in fp64.
# Compiled, it is one kernel that keeps nothing, and takes all at a time.
PIECE_SIZE = 1 << 20
MEASURED_BYTES = 32  # of an element, where it is not compiled

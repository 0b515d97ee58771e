"""Control branches put beside a network."""

from errors import UserError
from pixart.control import ControlBranch
from pixart.model import PixArt, PixArtConfig

# Of 28 blocks, as published (PixArt-delta, section 4).
NUM_COPIES = 13


def new_branch(config: PixArtConfig, num_copies: int) -> ControlBranch:
    """Return a branch of random weights for a network of this shape."""
    return ControlBranch(
        num_copies,
        config.width,
        num_heads=config.num_heads,
        adaln=config.adaln,
        compressed_blocks=config.kv_compressed_blocks,
    )


def add_branch(network: PixArt, num_copies: int, *, key: str) -> ControlBranch:
    """Put a control branch beside a network, in place, with the weights of its first blocks; it changes nothing yet.

    Raises:
        UserError: the network has not so many blocks behind its first; names the recipe `key`.
    """
    num_blocks = len(network.blocks)
    if not 1 <= num_copies < num_blocks:
        raise UserError(
            f"{key} = {num_copies}: copies feed the blocks behind the first, of which a network of {num_blocks} blocks "
            f"has {num_blocks - 1}; half of the blocks is usual ({NUM_COPIES} of 28)"
        )
    branch = network.control = new_branch(network.config, num_copies)
    weights = network.blocks[:num_copies].state_dict()
    branch.copies.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return branch

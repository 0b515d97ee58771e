"""What to do about files of the world and its samples that are damaged."""

from pipelines.as_typed import typed_command


def mend_sample() -> str:
    """Return what to do about a damaged sample."""
    return (
        f"delete it, and `{typed_command('sample')}` (or `{typed_command('eval')}`, of its own samples) draws it anew"
    )


def mend_world() -> str:
    """Return what to do about a damaged file of the world."""
    return f"remove it and type `{typed_command('world')}` again: that writes it anew"

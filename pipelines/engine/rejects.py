"""Which samples a command is asked for, and when it has rejected too many of them."""

from collections import Counter
from collections.abc import Sequence

from errors import TooManyRejectsError
from pipelines.engine.pieces import Piece, Source
from pipelines.store.manifest import Fingerprint, ShardDirectory

# Why a sample has no features that a choice leaves out: it was not looked at, and is no fault.
NOT_CHOSEN = "not_chosen"


def is_wanted(piece: Piece, index: int) -> bool:
    """Whether a sample of a piece's source, by its number there, is to be looked at."""
    return piece.wanted is None or bool(piece.wanted[index - piece.start])


def require_few_rejects(
    output: ShardDirectory, sources: Sequence[Source], fingerprint: Fingerprint, *, limit: float, room: str
) -> None:
    """Refuse an output of which `room` itself has rejected more than `limit`, a fraction of 0 to 1.

    A reason with another room's name before it, as `caption:loop`, is a reject of that room, which has held it against
    a limit of its own: who has raised that one is not stopped by this one for the same samples. Nor does it count what
    a choice has left out: it is none of the samples that were asked for.

    Raises:
        TooManyRejectsError: it has; names the three largest reasons.
    """
    reports = [report for source in sources if (report := output.report(source.name, fingerprint))]
    num_read = sum(report.num_read - report.rejected.get(NOT_CHOSEN, 0) for report in reports)
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(
            {name: count for name, count in report.rejected.items() if ":" not in name and name != NOT_CHOSEN}
        )
    num_rejected = reasons.total()
    if num_rejected <= limit * num_read:
        return
    largest = ", ".join(f"{name} {count}" for name, count in reasons.most_common(3))
    # Sampling, which may lose none, has no such key.
    key = f", more than {room.split()[0]}.max_reject_fraction = {limit:.1%}" if limit else ""
    raise TooManyRejectsError(
        f"{output.path}: {num_rejected} of {num_read} samples rejected ({num_rejected / num_read:.1%}){key}: {largest}"
    )

"""Which scores a recipe asks for, each after those that it is made from."""

from collections.abc import Sequence

from curation.config import ColumnsConfig
from curation.scores.pixels import Pixels
from curation.scores.protocol import Score
from errors import UserError
from pipelines.as_typed import did_you_mean


def known_scores(config: ColumnsConfig) -> list[Score]:
    """Return every score that the recipe's settings allow, in an order in which each can be made."""
    # Compiled kernels, which help and a recipe's keys have no use for.
    from curation.scores.hashes import Hashes

    del config
    return [Pixels(), Hashes()]


def chosen_scores(config: ColumnsConfig) -> list[Score]:
    """Return the scores that the recipe asks for, and those that they are made from, in an order to make them in.

    Raises:
        UserError: there is no such score; names the key.
    """
    known = known_scores(config)
    by_name = {score.name: score for score in known}
    for name in config.scores:
        if not _named(name, known):
            names = list(dict.fromkeys(each.partition("@")[0] for each in by_name))
            raise UserError(
                f"columns.scores: there is no score {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}"
            )
    chosen: dict[str, Score] = {}
    for name in config.scores:
        for score in _named(name, known):
            _add(score, by_name, chosen)
    return [score for score in known if score.name in chosen]


def _named(name: str, known: Sequence[Score]) -> list[Score]:
    """Return the score of a name; of one about captions those of all caption columns."""
    return [score for score in known if name in (score.name, score.name.partition("@")[0])]


def _add(score: Score, by_name: dict[str, Score], chosen: dict[str, Score]) -> None:
    if score.name in chosen:
        return
    for reads in score.reads:
        needed = by_name.get(reads.folder.removeprefix("columns/"))
        if needed is not None and reads.folder.startswith("columns/"):
            _add(needed, by_name, chosen)
    chosen[score.name] = score

"""Which scores a recipe asks for, each after those that it is made from."""

from collections.abc import Sequence
from pathlib import Path

from curation.config import ColumnsConfig
from curation.scores.clip import Clip, ClipChoice, ClipScore
from curation.scores.heads import Head
from curation.scores.joined import JoinedTable
from curation.scores.pixels import Pixels
from curation.scores.protocol import Score
from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.columns.caption_columns import is_beside_captions


def known_scores(config: ColumnsConfig, run: Path) -> list[Score]:
    """Return every score that the recipe's settings allow, in an order in which each can be made."""
    # Compiled kernels, which help and a recipe's keys have no use for.
    from curation.scores.duplicates import Duplicates
    from curation.scores.hashes import Hashes

    tables = [JoinedTable(name, table.files, run) for name, table in config.tables.items()]
    clip = ClipChoice(
        model=config.clip_model, revision=config.clip_revision, device=config.device, batch_size=config.clip_batch_size
    )
    others = [
        Pixels(),
        Hashes(),
        Clip(clip),
        *(
            ClipScore(clip, caption_column=name, is_beside=is_beside_captions(run, name))
            for name in config.caption_columns
        ),
        *(Head(name, file=head.file, clip=clip) for name, head in config.heads.items()),
        *tables,
    ]
    return [*others, Duplicates(config.duplicates, run, others=others, clip=clip)]


def chosen_scores(config: ColumnsConfig, run: Path) -> list[Score]:
    """Return the scores that the recipe asks for, and those that they are made from, in an order to make them in.

    Raises:
        UserError: there is no such score; names the key.
    """
    known = known_scores(config, run)
    by_name = {score.name: score for score in known}
    for table, noun in (("tables", "table"), ("heads", "head")):
        for name in getattr(config, table):
            if [score.name for score in known].count(name) > 1:
                raise UserError(
                    f"columns.{table}.{name}: a score is called {name} already; give the {noun} another name"
                )
    for name in config.scores:
        if not _named(name, known):
            names = list(dict.fromkeys(each.partition("@")[0] for each in by_name))
            raise UserError(
                f"columns.scores: there is no score {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}"
            )
    chosen: dict[str, Score] = {}
    for name in (*config.scores, *config.heads, *config.tables):
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

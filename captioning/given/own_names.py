"""Names of texts of the samples themselves: those that are typed, against those that there are."""

from collections.abc import Sequence
from pathlib import Path

from captioning.given.coverage import GivenSource
from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard, open_shard
from pipelines.raw.texts import json_members

SHARDS_LOOKED_AT, SAMPLES_LOOKED_AT, MAX_NAMED = 4, 1000, 20

log = get_logger("captioning")


def require_own_texts(
    given: Sequence[GivenSource], sources: Sequence[Source], *, num_texts: int, reading: Reading, run: Path
) -> None:
    """Refuse shards that are to bring their captions, if no sample has a text that is known as one.

    Args:
        num_texts: samples that may have one, as far as headers tell.

    Raises:
        UserError: there is none; names the columns there are, and the keys that help.
    """
    is_named = reading.text_column is not None or any(source.address.own != "" for source in given)
    if num_texts or is_named or not given or not sources:
        return
    path = sources[0].path
    with open_shard(path, reading, run=run, identity=sources[0].identity) as raw:
        columns = ", ".join(raw.columns)
    there = f"has the columns {columns}: say with data.text_column which is the text" if columns else "has no texts"
    raise UserError(
        f"captioning.engine = 'given': no sample has a text of its own. {path} {there}; captions in another file are "
        "captioning.table='captions.csv#key,caption'; without captioning.engine LLaVA writes them, and photos of one "
        "subject need none (recipes/dreambooth.toml)"
    )


def check_own_names(given: Sequence[GivenSource], sources: Sequence[Source], *, reading: Reading, run: Path) -> None:
    """Warn of `data.text_column` and of each `#name` of `captioning.table` that no text at the beginning is called.

    Raises:
        UserError: all samples have been looked at, and none has it; names the texts there are.
    """
    typed = {source.address.key: source.address.own for source in given if source.address.own}
    if reading.text_column is not None:
        typed[f"data.text_column = {reading.text_column!r}"] = reading.text_column
    names: dict[str, None] = {}
    num_samples = num_usable = 0
    for source in sources[:SHARDS_LOOKED_AT]:
        if not typed:
            return
        with open_shard(source.path, reading, run=run, identity=source.identity) as raw:
            usable = [sample for sample in raw.samples if sample.reject is None]
            num_usable += len(usable)
            for sample in usable[:SAMPLES_LOOKED_AT]:
                num_samples += 1
                typed = {key: name for key, name in typed.items() if not _has_text(raw, sample, name)}
                names.update(dict.fromkeys((*raw.text_names(sample), *raw.columns)))
                if json_members(sample.key, sample.members):
                    names["fields of their JSON"] = None
    listed = ", ".join(list(names)[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")
    is_whole = num_samples == num_usable and len(sources) <= SHARDS_LOOKED_AT
    for key, name in typed.items():
        said = (
            f"{key}: none of the {'' if is_whole else 'first '}{num_samples:,} samples has a text of this name; "
            f"names there are {listed or 'none'}{did_you_mean(name, names)}"
        )
        if is_whole:
            raise UserError(said)
        log.warning(said)


def _has_text(raw: RawShard, sample: RawSample, name: str) -> bool:
    try:
        return raw.named_text(sample, name) is not None
    except SampleReject:  # it is there, and cannot be read
        return True

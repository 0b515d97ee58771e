"""What a judge found of a folder of samples, read from a file that anybody may write; see docs/EVALUATION.md."""

from pathlib import Path
from typing import Any, Literal

import pydantic

from errors import UserError
from pipelines.engine.progress import get_logger
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.contestants import Contestant

log = get_logger("evaluation")


class Axis(pydantic.BaseModel):
    """One of the judge's numbers, over the `num_images` that it is about; one about none is not shown."""

    name: str = pydantic.Field(min_length=1)
    score: float = pydantic.Field(allow_inf_nan=False)
    num_images: int = pydantic.Field(ge=0)
    better: Literal["higher", "lower"] = "higher"


class Judgement(pydantic.BaseModel):
    """A judge's results for one folder of samples; further keys of the file are the judge's own.

    Attributes:
        judge: its name or folder, and judge_fingerprint: hash of its weights or version of its rules.
        method: how it looks at an image, in a few words.
        samples_fingerprint: `fingerprint.digest` of the samples' manifest.json, None where the folder has none.
        samples_source: `source` of the only shard in there.
        axes: in the order of the table's columns.
    """

    judge: str
    judge_fingerprint: str
    method: str = ""
    samples_fingerprint: str | None
    samples_source: str | None = None
    axes: list[Axis]

    @pydantic.field_validator("axes", mode="before")
    @classmethod
    def _list_axes(cls, value: Any) -> Any:
        """Files written before axes had an order hold them by name."""
        if isinstance(value, dict):
            return [{"name": name, **axis} if isinstance(axis, dict) else axis for name, axis in value.items()]
        return value


def judgement_file(contestant: Contestant, config: EvaluationConfig, run: Path) -> Path:
    """Return where `evaluation.judgements` says that the results for a contestant's samples are."""
    return config.folder(config.judgements.replace("{samples}", contestant.folder.name), run)


def read_judgement(contestant: Contestant, config: EvaluationConfig, run: Path) -> Judgement | None:
    """Return a judge's results for these very samples; None where there is no file, or it is of other samples.

    Raises:
        UserError: the file is not as docs/EVALUATION.md says; names file and key.
    """
    path, job = judgement_file(contestant, config, run), contestant.job
    if not path.is_file():
        # The default is a place to look; a file that somebody names is expected there.
        if "judgements" in config.model_fields_set:
            log.warning(f"evaluation.judgements: {path} does not exist")
        return None
    try:
        judgement = Judgement.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"evaluation.judgements {path}: {where + ': ' if where else ''}{first['msg']}") from None
    if (judgement.samples_fingerprint, judgement.samples_source) != (job.fingerprint.digest, job.identity):
        log.warning(f"{path} is of other samples than {contestant.folder} holds: let the judge see these")
        return None
    return judgement

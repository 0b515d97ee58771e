"""`trainer.json` as it was before stages had names, in today's words: checkpoints of such runs go on."""

from typing import Any


def in_todays_words(trainer: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's `trainer.json`; where `stage` is one of the paper's numbers, its keys have other names.

    Its fingerprint holds fields at their default, too, which changes nothing: a missing one means just that.
    """
    number = trainer.get("stage")
    if not isinstance(number, int):
        return trainer
    fields = dict(trainer["fingerprint"])
    fields["random_stream"] = fields.pop("stage")
    fields["training.starts_from"] = fields.pop("training.init_from")
    fields["training.network"] = trainer["kind"]
    starts_from = trainer.get("init_from")
    if starts_from is None and number > 1:
        starts_from = f"stage{number - 1}"
    others = {key: value for key, value in trainer.items() if key not in ("stage_name", "init_from")}
    name = trainer.get("stage_name", f"stage{number}")
    return others | {"stage": name, "starts_from": starts_from, "fingerprint": fields}

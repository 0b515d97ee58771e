"""The shape of a stage's network: that of the weights it starts from or goes on with, else what `[model]` says."""

from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.recipe import ModelConfig, Recipe
from pipelines.store.checkpoints import Checkpoint
from pixart.stored_shapes import stored_shape
from training.codec_keys import CODEC

# Of one kind of network alone: what another kind says of it contradicts nothing.
OF_KIND = {"num_classes": "dit", "adaln": "pixart", "size_condition": "pixart"}
# Side of latents that a file is taken to be trained at, where it does not say: positions are no key of `[model]`.
ANY_SIDE = 32


def stage_shape(
    recipe: Recipe,
    stage: str,
    *,
    network: str,
    start: Path | None,
    former: Checkpoint | None,
    resume: Checkpoint | None,
) -> ModelConfig:
    """Return `[model]`, where keys that are not typed are those of the weights that a stage has or starts from.

    Args:
        recipe: has `[model]`.
        stage: what is trained.
        network: its kind, `dit`, `pixart` or `vae`.
        start: folder or file of the weights that it starts from, None for fresh ones.
        former: the checkpoint of ours that those are of, if they are of one.
        resume: its own checkpoint that it goes on from.

    Raises:
        UserError: a typed key contradicts the weights it starts from; names the key, both values and the weights. Or it
            starts from none, and the recipe has no `[model]`.
    """
    typed = recipe.table("model", ModelConfig)
    if network == CODEC:  # whose shape is no transformer's
        return typed
    where = f"training.{stage}.starts_from ({start})"
    is_typed = recipe.tables.get("model", {}).keys()
    if resume is not None:
        # What is typed is compared with it as all else is that must be as it was.
        found = _trained_shape(resume)
    elif former is not None:
        found = _trained_shape(former)
    elif start is not None:
        found = stored_shape(start) if start.is_dir() else _file_shape(start, where=where)
    elif "model" in recipe.tables:
        return typed
    else:
        raise UserError(
            f"{recipe.blame('training', stage, 'starts_from')}: training.{stage} starts from scratch, and nothing says "
            "the shape of its network: give [model] its num_layers, num_heads and head_dim (28, 16 and 72 are the "
            f"paper's XL/2), or name the weights to start from as training.{stage}.starts_from"
        )
    for key in [key for key in found if key in is_typed and resume is None]:
        value = getattr(typed, key)
        if value != found[key] and OF_KIND.get(key, network) == network:
            raise UserError(
                f"{recipe.blame('model', key)}: model.{key} = {value!r}, but the weights of {where} have "
                f"{found[key]!r}: leave model.{key} out, or start from others"
            )
    return ModelConfig.model_validate(typed.model_dump() | {key: found[key] for key in found.keys() - is_typed})


def _trained_shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the whole `[model]` that a checkpoint of ours was trained with."""
    fields = checkpoint.trainer["fingerprint"]
    kind = fields.get("training.network")
    return {
        key: fields.get(f"model.{key}", default)
        for key, default in ModelConfig.fingerprint_defaults().items()
        if OF_KIND.get(key) != "pixart" or kind != "dit"
    }


def _file_shape(path: Path, *, where: str) -> dict[str, Any]:
    """Return the keys of `[model]` that an original file decides; raises as `infer_config` does, and names `where`."""
    from pixart.convert import infer_config
    from pixart.tensor_files import read_weight_file

    stored = read_weight_file(path)
    try:
        side = None if "pos_embed" in stored.tensors else ANY_SIDE
        found = infer_config(stored.tensors, sample_size=side, num_heads=stored.num_heads)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    shape = {key: getattr(found, key) for key in ("num_layers", "num_heads", "head_dim", "patch_size")}
    if found.kind == "dit":
        return shape | {"num_classes": found.num_classes}
    return shape | {"adaln": found.adaln, "size_condition": found.has_size_condition}

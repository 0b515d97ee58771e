"""What the weights a stage starts from were trained with, compared with its features and its recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.kl import PUBLISHED_VAE
from encoders.likeness import is_same_codec, is_same_text_encoder
from errors import UserError
from pipelines.command import Command
from pipelines.store.checkpoints import Checkpoint
from pipelines.store.families import NULL_CAPTION_FILE
from pixart.differences import Difference, Uses, differences
from pixart.evidence import origins_of_folder
from pixart.origins import Origins, Positions
from pixart.processes.specs import network_schedule_of, predicts_alike, process_title
from training.config import StageTraining
from training.data.features import StageFeatures

if TYPE_CHECKING:
    from torch import Tensor

# Keys of a recipe that say what is compared.
KEYS = {
    "text_encoder": "features.text_model",
    "max_tokens": "features.max_tokens",
    "cleaning": "features.text_cleaning",
    "vae": "features.vae_model",
    "positions": "training.{stage}.interpolation_scale",
}
# What to do about one that is otherwise; of features they are to be made anew.
WAYS = {"positions": "leave it out, and the positions are those of the weights"}


def origins_of_weights(path: Path, *, location: str) -> Origins:
    """Return what is known of a diffusers folder or original file, which `location` named; raises as opening it does.

    Of a file that holds no positions they are not known.
    """
    if path.is_dir():
        return origins_of_folder(path, location=location)
    from pixart.convert import file_origins
    from pixart.tensor_files import read_weight_file

    return file_origins(path, read_weight_file(path))


def with_positions(
    settings: StageTraining, origins: Origins, *, features: StageFeatures, resume: Checkpoint | None
) -> StageTraining:
    """Return the settings with a scale of positions, where the recipe leaves it to the weights.

    It is that of the checkpoint to resume, else that of the weights the stage starts from, for the features'
    resolution: positions span what they spanned (paper A.5). From scratch it is 1.
    """
    if settings.interpolation_scale is not None:
        return settings
    scale = 1.0
    if resume is not None:
        scale = resume.trainer["fingerprint"].get("training.interpolation_scale", 1.0)
    elif origins.positions is not None:
        scale = origins.positions.value.scale_at(_side(features))
    return settings.model_copy(update={"interpolation_scale": scale})


def require_agreement(
    command: Command, settings: StageTraining, features: StageFeatures, *, origins: Origins, path: Path, key: str
) -> list[str]:
    """Compare weights that the recipe's `key` names with the features and the recipe; returns what is to be said.

    Raises:
        UserError: something is otherwise than they were trained with and `departs_in` does not name it; names both
            values, the key and the file that says it.
    """
    stage, recipe = command.stage_name, command.recipe
    uses = _uses(settings, features)
    found = differences(origins, uses, is_same_text_encoder=is_same_text_encoder, is_same_codec=is_same_codec)
    found, said = _with_null_caption(found, origins, uses, features=features, path=path)
    where = f"{key} ({path})"
    for difference in found:
        name = KEYS[difference.name].format(stage=stage)
        trained = f"the weights of {where} were trained with {difference.trained}"
        if difference.doubt is not None:
            said.append(f"{name} is {difference.used}, and {trained}: {difference.doubt}")
        elif difference.name in settings.departs_in:
            said.append(f"{name} is {difference.used}, but {trained}, as training.{stage}.departs_in says it may be")
        else:
            place = f"{recipe.blame('training', stage, 'interpolation_scale')}: " if name.startswith("training") else ""
            way = WAYS.get(difference.name, f"set it to that and make the features anew ({features.table_name})")
            raise UserError(
                f"{place or f'{recipe.path}: '}{name} is {difference.used}, but {trained}: {way}; "
                f"if it is meant, training.{stage}.departs_in = [{difference.name!r}] says so"
            )
    return said


def require_process(command: Command, settings: StageTraining, trained: Mapping[str, Any], *, key: str) -> None:
    """Refuse weights of another process than the default, or that say something else, where nobody has typed that.

    Their last layer would be lost, or they would go on otherwise than they were trained; `trained` is their spec.

    Raises:
        UserError: names both processes and what to type; or the weights, which predict the noise and are to go on as
            flow, are of another noise schedule than networks of flow that do.
    """
    stage, own = command.stage_name, settings.process_spec
    is_same = predicts_alike(trained, own)
    if own["name"] == "flow" and is_same:
        require_own_schedule(trained, own, key=key)
    name = "process" if trained["name"] != own["name"] else "flow_prediction"
    if name in command.recipe.laid_over("training", stage) or (trained["name"] == own["name"] and is_same):
        return
    wanted, value = {
        "process": (trained["name"], own["name"]),
        "flow_prediction": (trained["prediction"], own["prediction"]),
    }[name]
    also = " and flow_prediction = 'noise'" if name == "process" and "network_schedule" in trained else ""
    raise UserError(
        f"{command.recipe.path}: training.{stage}.{name} is {value!r} where none is typed, but the "
        f"weights of {key} were trained with {process_title(trained)!r}: type training.{stage}.{name} = {wanted!r}"
        f"{also} to go on with it, or {value!r} to {'train them so' if is_same else 'begin their output layer anew'}"
    )


def require_own_schedule(process: Mapping[str, Any], own: Mapping[str, Any], *, key: str) -> None:
    """Refuse weights whose timesteps are of another noise schedule than a stage's `own` process tells its network.

    Raises:
        UserError: names their `key` and both values.
    """
    # Of flow it says where times are drawn, which changes nothing of what a network says at one of them.
    wanted, found = network_schedule_of(own), network_schedule_of(process)
    if wanted is None or found is None:
        return
    for name, value in wanted.items():
        if (other := found[name]) != value:
            raise UserError(f"{key} was trained with {name} {other} of its noise schedule, and the stage's is {value}")


def describe_schedule(settings: StageTraining, trained: Mapping[str, Any]) -> str | None:
    """Return what to say of ddpm's weights of another noise schedule than the one they go on with, else None."""
    if settings.process != "ddpm" or trained["name"] != "ddpm":
        return None
    own, former = settings.process_spec["schedule"], trained.get("schedule", {})
    differing = [name for name, value in own.items() if former.get(name, value) != value]
    if not differing:
        return None
    told = ", ".join(f"{name} {former[name]} -> {own[name]}" for name in differing)
    return f"noise schedule: {told}; the weights were trained with the former and learn the latter"


def describe_positions(settings: StageTraining, origins: Origins, *, features: StageFeatures) -> str | None:
    """Return what to say of positions that span something else than those of the weights, None where they do not."""
    if origins.positions is None or settings.network == "dit":
        return None
    former, side = origins.positions.value, _side(features)
    adapted = former.scale_at(side)
    if side == former.sample_size or abs(adapted / settings.position_scale - 1) < 1e-5:
        return None
    return (
        f"positions: interpolation_scale {settings.position_scale:g} at {side} latents a side; the weights have "
        f"{former.scale:g} at {former.sample_size}, which spans what {adapted:g} would here"
    )


def _side(features: StageFeatures) -> int:
    """Return the side of the features' latents; manifests of before the factor was recorded are of the paper's."""
    return features.resolution // features.vae.get("factor", PUBLISHED_VAE.factor)


def _uses(settings: StageTraining, features: StageFeatures) -> Uses:
    vae, fields = features.vae, features.fingerprint_fields()
    uses = Uses(
        vae=_names(vae["model"], fields.get("latents.vae_model")),
        vae_revision=vae.get("revision"),
        vae_scale=vae.get("scaling_factor"),
        vae_shift=vae.get("shift_factor"),
    )
    text = features.text_encoder
    if settings.network != "pixart" or text is None:
        return uses
    return replace(
        uses,
        text_encoder=_names(text["model"], fields.get("text.text_model")),
        text_revision=text.get("revision"),
        max_tokens=text["max_tokens"],
        cleaning=text.get("cleaning", "lower"),
        positions=Positions(sample_size=_side(features), scale=settings.position_scale),
    )


def _names(model: str, identity: Any) -> tuple[str, ...]:
    return (model, identity) if isinstance(identity, str) else (model,)


def _with_null_caption(
    found: Sequence[Difference], origins: Origins, uses: Uses, *, features: StageFeatures, path: Path
) -> tuple[list[Difference], list[str]]:
    """Compare the null caption of an original file with the features'.

    Where nothing tells whether the text encoders are one, it does: a null caption that is neither the features' nor
    random is another encoder's. Where they are known to be one, that is said.
    """
    found = list(found)
    stored = None if uses.text_encoder is None or path.is_dir() else _stored_null_caption(path)
    text = next((one for one in features.datasets[0].directories if one.family.null_file == NULL_CAPTION_FILE), None)
    if stored is None or text is None:
        return found, []
    from pixart.null_captions import compare_null_caption, describe_null_caption
    from training.data.reading import read_null

    kind = compare_null_caption(stored, read_null(text, NULL_CAPTION_FILE))
    doubt = next((one for one in found if one.name == "text_encoder" and one.doubt is not None), None)
    if kind == "same":
        return [one for one in found if one is not doubt], []
    if kind == "random":
        return found, [describe_null_caption(kind, file=str(path))]
    if origins.text_encoder is not None and doubt is None:
        return found, [describe_null_caption(kind, file=str(path))]
    used, trained = repr((uses.text_encoder or ("",))[0]), f"another null caption, which is in {path}"
    sure = Difference(name="text_encoder", used=used, trained=trained)
    return [sure if one is doubt else one for one in found] if doubt else [sure, *found], []


def _stored_null_caption(path: Path) -> "Tensor | None":
    from pixart.layouts import NULL_CAPTION
    from pixart.tensor_files import read_weight_file

    stored = read_weight_file(path).tensors.get(NULL_CAPTION)
    return stored if stored is not None and stored.ndim == 2 else None

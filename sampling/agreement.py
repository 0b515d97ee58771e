"""What a checkpoint from elsewhere was trained with, beside the encoders that a recipe gives it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from encoders.kl import PUBLISHED_VAE
from encoders.latents import LatentSpec
from encoders.likeness import is_same_codec, is_same_text_encoder
from encoders.opening import latent_spec
from encoders.text import CLEANINGS, DEFAULT_CLEANING
from encoders.weights import HUB_ID, model_folder, resolve_model
from errors import UserError
from pipelines.engine.progress import get_logger
from pixart.differences import Uses, differences
from pixart.origins import Fact, Origins
from sampling.config import EncoderConfig

if TYPE_CHECKING:
    from torch import Tensor

log = get_logger("sampling")

DEFAULT_MAX_TOKENS = 120
KEYS = {
    "text_encoder": "features.text_model",
    "max_tokens": "features.max_tokens",
    "cleaning": "features.text_cleaning",
    "vae": "features.vae_model",
}


def agreed_encoders(
    location: str,
    origins: Origins,
    encoders: EncoderConfig | None,
    *,
    needed: Collection[str],
    departs_in: Collection[str],
) -> dict[str, dict[str, Any]]:
    """Return the `text` and `vae` of `TrainedModel` for a checkpoint that lacks the `needed` ones of them.

    They are those of the recipe, or where it names none those that the weights were trained with; tokens and cleaning
    are the weights' own where the recipe does not type them.

    Raises:
        UserError: nobody names them, or the recipe names others than the weights were trained with and `departs_in`
            does not say that this is meant; names both.
    """
    if encoders is None:
        encoders = _own_encoders(location, origins, needed=needed)
    else:
        _require_agreement(location, origins, encoders, needed=needed, departs_in=departs_in)
    parts: dict[str, dict[str, Any]] = {}
    if "text" in needed:
        parts["text"] = {
            "model": encoders.text_model,
            "revision": encoders.text_revision,
            "max_tokens": encoders.max_tokens or _value(origins.max_tokens, DEFAULT_MAX_TOKENS),
            "cleaning": encoders.text_cleaning or own_cleaning(origins),
        }
    if "vae" in needed:
        parts["vae"] = {"model": encoders.vae_model, "revision": encoders.vae_revision}
    return parts


def own_cleaning(origins: Origins) -> str:
    """Return the rule by which the weights' texts were cleaned, the usual one where nothing says it.

    Raises:
        UserError: what says it names a rule that is not known here.
    """
    if (fact := origins.cleaning) is None:
        return DEFAULT_CLEANING
    if fact.value not in CLEANINGS:
        raise UserError(f"{fact.source}: texts were cleaned as {fact.value!r}, which is none of {', '.join(CLEANINGS)}")
    return fact.value


def codec_spec(vae: Mapping[str, Any]) -> LatentSpec:
    """Return the spec of a VAE; one of the hub that is not in the cache yet is taken for the paper's."""
    return _known_spec(vae["model"], vae["revision"]) or PUBLISHED_VAE


def check_null_caption(stored: "Tensor", encoded: "Tensor", *, file: str, encoder: str, is_known: bool) -> None:
    """Compare the null caption of an original file with what the text encoder gives for no text, and say what differs.

    Raises:
        UserError: it is neither that nor random, and nothing else says that the encoder is the one (`is_known`).
    """
    from pixart.null_captions import compare_null_caption, describe_null_caption

    kind = compare_null_caption(stored, encoded)
    if kind == "same":
        return
    if kind == "other" and not is_known:
        raise UserError(
            f"text encoder {encoder} is not the one that the weights were trained with: for no text it does not give "
            f"the null caption in {file}; name the one that does as features.text_model, or if you know better, "
            "sampling.departs_in = ['text_encoder']"
        )
    log.warning(describe_null_caption(kind, file=file))


def _own_encoders(location: str, origins: Origins, *, needed: Collection[str]) -> EncoderConfig:
    """Return the encoders that the weights were trained with, where those are known."""
    text, vae = origins.text_encoder, origins.vae
    if (text is None and "text" in needed) or vae is None:
        raise UserError(
            f"sampling.checkpoint {location} comes without text encoder and VAE: the recipe must name them as "
            "features.text_model and features.vae_model"
        )
    if not vae.is_sure:
        log.warning(
            f"sampling.checkpoint {location} is drawn from with {vae.value[0]}{'' if text is None else ' and '}"
            f"{'' if text is None else text.value[0]}, {vae.source}: where it is of another training, name its own as "
            "features.text_model and features.vae_model"
        )
    text_model = "" if text is None else _name_to_load(location, text, key="features.text_model")
    vae_model = _name_to_load(location, vae, key="features.vae_model")
    return EncoderConfig(
        text_model=text_model,
        text_revision=_revision_of(text_model, text, origins.text_revision),
        vae_model=vae_model,
        vae_revision=_revision_of(vae_model, vae, origins.vae_revision),
    )


def _revision_of(model: str, names: Fact[tuple[str, ...]] | None, revision: Fact[str] | None) -> str | None:
    """Return the commit of the hub to load a model at: it is of the first of the names."""
    is_of_it = names is not None and model == names.value[0]
    return revision.value if is_of_it and revision is not None else None


def _name_to_load(location: str, fact: Fact[tuple[str, ...]], *, key: str) -> str:
    """Return the first of a model's names under which it is on disk, else one that the hub may know."""
    for is_right in (model_folder, HUB_ID.fullmatch):
        for name in fact.value:
            if is_right(name) is not None:
                return name
    raise UserError(
        f"sampling.checkpoint {location} was trained with {fact.value[0]!r} ({fact.source}), which is not there: "
        f"name a copy of it as {key}"
    )


def _require_agreement(
    location: str, origins: Origins, encoders: EncoderConfig, *, needed: Collection[str], departs_in: Collection[str]
) -> None:
    uses = Uses()
    if "text" in needed:
        uses = Uses(
            text_encoder=(encoders.text_model,),
            text_revision=encoders.text_revision,
            max_tokens=encoders.max_tokens,
            cleaning=encoders.text_cleaning,
        )
    if "vae" in needed:
        spec = _known_spec(encoders.vae_model, encoders.vae_revision)
        uses = replace(
            uses,
            vae=(encoders.vae_model,),
            vae_revision=encoders.vae_revision,
            vae_scale=None if spec is None else spec.scale,
            vae_shift=None if spec is None else spec.shift,
        )
    for difference in differences(
        origins, uses, is_same_text_encoder=is_same_text_encoder, is_same_codec=is_same_codec
    ):
        key = KEYS[difference.name]
        trained = f"the weights of sampling.checkpoint {location} were trained with {difference.trained}"
        if difference.doubt is not None:
            log.warning(f"{key} is {difference.used}, and {trained}: {difference.doubt}")
        elif difference.name in departs_in:
            log.warning(f"{key} is {difference.used}, but {trained}, as sampling.departs_in says it may be")
        else:
            raise UserError(
                f"{key} is {difference.used}, but {trained}: name that one, or leave it out where it is the number or "
                f"rule; if it is meant, sampling.departs_in = [{difference.name!r}] says so"
            )


def is_encoder_known(origins: Origins, model: str) -> bool:
    """Whether a text encoder is known to be the one that the weights were trained with."""
    names: Sequence[str] = () if origins.text_encoder is None else origins.text_encoder.value
    return is_same_text_encoder(names, (model,)) is True


def _known_spec(model: str, revision: str | None) -> LatentSpec | None:
    return latent_spec(resolve_model(model, revision), key="VAE")


def _value(fact: Any, default: Any) -> Any:
    return default if fact is None else fact.value

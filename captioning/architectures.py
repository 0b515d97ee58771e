"""Which engine captions with a model in process, told from its `config.json` before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from encoders.weights import ModelSource, read_config
from errors import UserError

# What `engines.llama` computes.
LLAVAS = ("llava", "llava_next")
TEXT_MODELS = ("llama", "mistral", "qwen2")
# The one vision tower of LLaVA whose images have as many features as they are large.
UNEVEN_VISION = "pixtral"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model's files say it is: its class, and the types (names of transformers) of the whole and of its text."""

    name: str
    model_type: str
    text_type: str
    vision_type: str

    @property
    def has_continuous_batching(self) -> bool:
        """Whether the engine `transformers` has its layers; of others, `generate` has transformers' own."""
        is_known = self.model_type in LLAVAS and self.text_type in TEXT_MODELS
        return is_known and self.vision_type != UNEVEN_VISION


def read_architecture(source: ModelSource) -> Architecture | None:
    """Return a model's architecture, None for a hub model whose files are not here yet.

    Raises:
        MissingFileError: a local folder holds no model.
    """
    config = read_config(source)
    if config is None:
        return None
    model_type = str(config.get("model_type", "unknown"))
    names = config.get("architectures") or [f"model of type {model_type!r}"]
    return Architecture(
        name=str(names[0]),
        model_type=model_type,
        # LLaVA's own default, which files may leave out.
        text_type=_part_type(config, "text_config", default="llama"),
        vision_type=_part_type(config, "vision_config", default="clip_vision_model"),
    )


def require_fit(architecture: Architecture, model: str, *, table: str = "captioning") -> None:
    """Refuse a model that the engine `transformers` does not caption with; `table` of the recipe names both.

    Raises:
        UserError: names the model, what it is, and the engine that takes it.
    """
    if architecture.has_continuous_batching:
        return
    parts = (
        f" with {architecture.text_type} and {architecture.vision_type}" if architecture.model_type in LLAVAS else ""
    )
    raise UserError(
        f'{table}.model {model!r} is a {architecture.name}{parts}, but {table}.engine = "transformers" is for '
        f"LLaVA-1.5 and LLaVA-NeXT whose text model is {', '.join(TEXT_MODELS[:-1])} or {TEXT_MODELS[-1]}: set "
        f'{table}.engine = "generate", which is slower and takes any vision-language model of transformers'
    )


def _part_type(config: Mapping[str, Any], part: str, *, default: str) -> str:
    found = config.get(part)
    return str(found.get("model_type", default)) if isinstance(found, Mapping) else default

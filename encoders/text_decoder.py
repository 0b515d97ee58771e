"""Language models as text encoders, as Lumina, SANA and Wan have them: the last hidden states of a causal decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from encoders.text import HiddenStatesEncoder
from encoders.weights import ModelSource, load_pretrained

if TYPE_CHECKING:
    import torch


class DecoderTextEncoder(HiddenStatesEncoder):
    """A causal decoder without its language head, and its tokenizer, see `TextEncoder`."""

    # Text-only decoders of transformers. In a causal model padding on the right changes nothing on its left.
    model_types: ClassVar[tuple[str, ...]] = ("gemma", "gemma2", "gemma3_text", "llama", "qwen2", "qwen3")
    width_key: ClassVar[str] = "hidden_size"

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype, key: str) -> Any:
        """Load the weights but for those of the language head; raises as `encoders.weights.load_pretrained` does."""
        from transformers import AutoModel

        model = load_pretrained(AutoModel, source, settings={"dtype": dtype}, key=key)
        # Texts are read once, so there is nothing to keep for a next token.
        model.config.use_cache = False
        return model

    @staticmethod
    def blank_weights(config: Mapping[str, Any]) -> Any:
        """Return a decoder without values."""
        import torch
        from transformers import AutoConfig, AutoModel

        values = dict(config)
        loaded = AutoConfig.for_model(values.pop("model_type"), **values)
        loaded.use_cache = False
        with torch.device("meta"):
            return AutoModel.from_config(loaded).eval().requires_grad_(False)

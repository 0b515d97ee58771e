"""Language models as text encoders, as Lumina, SANA and Wan have them: the last hidden states of a causal decoder."""

# L text tokens, D text width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from encoders.batches import Batches
from encoders.text import TextSpec, clean_text, embed_tokens
from encoders.weights import ModelSource, require_complete

if TYPE_CHECKING:
    import torch


@dataclass
class DecoderTextEncoder:
    """A causal decoder without its language head, and its tokenizer, see `TextEncoder`.

    No token is added but those that the tokenizer adds itself (Gemma's begin token, for instance).
    """

    # Text-only decoders of transformers. In a causal model padding on the right changes nothing on its left.
    model_types: ClassVar[tuple[str, ...]] = ("gemma", "gemma2", "gemma3_text", "llama", "qwen2", "qwen3")

    spec: TextSpec
    model: Any
    tokenizer: Any
    batches: Batches

    @staticmethod
    def width(config: Mapping[str, Any]) -> int:
        """Return the width of the embeddings of a decoder with this `config.json`."""
        return config["hidden_size"]

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype) -> Any:
        """Load the weights of a causal decoder, on the CPU; those of its language head are left out.

        Raises:
            ValueError: the checkpoint lacks weights of the decoder.
        """
        from transformers import AutoModel

        model, loading = AutoModel.from_pretrained(
            source.location, revision=source.revision or "main", dtype=dtype, output_loading_info=True
        )
        require_complete(loading, f"{source.location} does not hold the weights of a {type(model).__name__}")
        # Texts are read once, so there is nothing to keep for a next token.
        model.config.use_cache = False
        return model

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; of one without any, such as Qwen's of '', the padding token."""
        if not texts:
            return []
        cleaned = [clean_text(text, self.spec.cleaning) for text in texts]
        ids = self.tokenizer(cleaned, truncation=True, max_length=self.spec.max_tokens).input_ids
        return [tokens or [self._pad_token_id] for tokens in ids]

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return one embedding [L, D] per text."""
        return embed_tokens(self.model, self.tokenize(texts), pad_token_id=self._pad_token_id, batches=self.batches)

    @property
    def _pad_token_id(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else end

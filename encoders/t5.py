"""The frozen text encoder of the paper: the encoder half of a T5 (arXiv 1910.10683)."""

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


def fuse_gelu(model: Any) -> Any:
    """Give a T5 encoder the tanh-approximated GELU as one kernel; transformers' "gelu_new" makes it of eight."""
    import torch

    for block in model.encoder.block:
        feed_forward = block.layer[-1].DenseReluDense
        if type(feed_forward.act).__name__ == "NewGELUActivation":
            feed_forward.act = torch.nn.GELU(approximate="tanh")
    return model


@dataclass
class T5Encoder:
    """The encoder half of a T5 and its tokenizer, see `TextEncoder`; a text that is cut keeps its end token."""

    model_types: ClassVar[tuple[str, ...]] = ("t5", "mt5")

    spec: TextSpec
    model: Any
    tokenizer: Any
    batches: Batches

    @staticmethod
    def width(config: Mapping[str, Any]) -> int:
        """Return the width of the embeddings of a T5 with this `config.json`."""
        return config["d_model"]

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype) -> Any:
        """Load the weights of a T5's encoder, on the CPU.

        Raises:
            ValueError: the checkpoint lacks weights of the encoder.
        """
        from transformers import T5EncoderModel

        loaded: Any = T5EncoderModel.from_pretrained(
            source.location, revision=source.revision or "main", dtype=dtype, output_loading_info=True
        )
        model, loading = loaded
        require_complete(
            loading,
            f"{source.location} does not hold the weights of a T5EncoderModel (save the model as one; the encoder of a "
            "T5ForConditionalGeneration alone has other key names)",
        )
        return fuse_gelu(model)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, the end-of-sequence token included."""
        if not texts:
            return []
        cleaned = [clean_text(text, self.spec.cleaning) for text in texts]
        limit = self.spec.max_tokens
        return self.tokenizer(cleaned, truncation=True, max_length=limit, add_special_tokens=True).input_ids

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return one embedding [L, D] per text."""
        pad = self.tokenizer.pad_token_id
        return embed_tokens(self.model, self.tokenize(texts), pad_token_id=pad, batches=self.batches)

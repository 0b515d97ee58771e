"""What a text encoder is: a spec, tokens and embeddings; and what all text encoders do alike.

This file and the classes behind `encoders.opening` load torch only when a model is loaded, so that configs may read
from here.
"""

# B batch, L text tokens (with padding), D text width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from encoders.batches import Batches
from encoders.weights import ModelSource

if TYPE_CHECKING:
    import torch

FP16_REFUSAL = "T5 was trained in bfloat16 and its activations overflow float16, which gives inf and nan embeddings"
TEXT_DTYPES = ("bfloat16", "float32")
# Tokens of a batch, padding included: enough to keep a GPU busy; few enough for activations to stay in a CPU's cache.
DEFAULT_BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}
# Rules of what a text encoder sees of a text; the first is that of diffusers' PixArt pipelines without `clean_caption`.
CLEANINGS = ("lower", "strip", "none")
DEFAULT_CLEANING = CLEANINGS[0]


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What is known of a text encoder before its weights are read.

    Attributes:
        width: of an embedding, D.
        max_tokens: longest embedding; longer texts are cut.
        cleaning: rule by which texts are cleaned before they become tokens, one of `CLEANINGS`.
        identity: of its files, as `encoders.weights.resolve_model` gives it.
    """

    width: int
    max_tokens: int
    cleaning: str
    identity: str


class TextEncoder(Protocol):
    """A loaded text encoder; `encoders.opening.open_text_encoder` gives one."""

    spec: TextSpec

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, cleaned and cut at `spec.max_tokens`; at least one of each."""
        ...

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return one embedding [num_tokens, D] per text, real tokens only, in the model's dtype, on the CPU.

        Values may be nan or inf where the model overflows: the caller decides what to do with the sample.
        """
        ...


@dataclass
class HiddenStatesEncoder:
    """A `TextEncoder` that gives the last hidden states of a model of transformers.

    A class for some kinds of model says which they are, how wide, and how their weights are loaded.

    Attributes:
        model_types: the kinds, by `model_type` of their `config.json`.
        width_key: key of their `config.json` that holds the width of an embedding.
    """

    model_types: ClassVar[tuple[str, ...]]
    width_key: ClassVar[str]

    spec: TextSpec
    model: Any
    tokenizer: Any
    batches: Batches

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype, key: str) -> Any:
        """Load the weights, frozen and on the CPU; raises as `encoders.weights.load_pretrained` does."""
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, with those that the tokenizer adds; of one without any the padding token.

        Gemma's tokenizer adds a begin token and T5's an end token, which a text that is cut keeps; Qwen's adds none.
        """
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


def clean_text(text: str, cleaning: str) -> str:
    """Return `text` as a text encoder sees it.

    `lower` is lower case without surrounding space, `strip` leaves the case as it is, `none` leaves all as it is.
    """
    if cleaning not in CLEANINGS:
        raise ValueError(f"cleaning {cleaning} is not one of {', '.join(CLEANINGS)}")
    if cleaning == "none":
        return text
    return text.lower().strip() if cleaning == "lower" else text.strip()


def require_text_dtype(dtype: str) -> None:
    """Refuse a compute dtype in which text encoders overflow.

    Raises:
        ValueError: names the dtype and those that there are; a field of a config adds its key.
    """
    if dtype not in TEXT_DTYPES:
        reason = f": {FP16_REFUSAL}" if dtype == "float16" else ""
        raise ValueError(f"text_dtype {dtype} is not one of {', '.join(TEXT_DTYPES)}{reason}")


def text_batches(num_tokens: int) -> Batches:
    """Return batches of token lists, longest first, of at most `num_tokens` with padding."""
    return Batches(num_tokens, cost=len)


def embed_tokens(model: Any, ids: Sequence[list[int]], *, pad_token_id: int, batches: Batches) -> list[torch.Tensor]:
    """Return the last hidden states [num_tokens, D] of each list of ids, on the CPU, in order.

    Texts of like length share a batch and are padded on the right, to the longest of it and never to a fixed length.
    """

    def encode_batch(batch: Sequence[list[int]]) -> list[torch.Tensor]:
        return _embed_batch(model, batch, pad_token_id=pad_token_id)

    order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
    results = batches.run([ids[index] for index in order], encode_batch)
    embeddings = dict(zip(order, results, strict=True))
    return [embeddings[index] for index in range(len(ids))]


def _embed_batch(model: Any, ids: Sequence[list[int]], *, pad_token_id: int) -> list[torch.Tensor]:
    import torch

    lengths = [len(tokens) for tokens in ids]
    input_ids = torch.full((len(ids), max(lengths)), pad_token_id)  # [B, L]
    mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(ids):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    with torch.inference_mode():
        hidden = model(input_ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
    hidden = hidden.cpu()  # [B, L, D]
    return [hidden[row, :length].clone() for row, length in enumerate(lengths)]

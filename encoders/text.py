"""What a text encoder is: a spec, tokens and embeddings; and what all text encoders do alike.

This file and the classes behind `encoders.opening` load torch only when a model is loaded, so that configs may read
from here.
"""

# B batch, L text tokens (with padding), N tokens of a batch without padding, D text width

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from encoders.batches import Batches
from encoders.token_kinds import TokenKinds, token_kinds
from encoders.transfers import HostCopy, one_behind, to_device
from encoders.weights import ModelSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FP16_REFUSAL = "T5 was trained in bfloat16 and its activations overflow float16, which gives inf and nan embeddings"
TEXT_DTYPES = ("bfloat16", "float32")
# Tokens of a batch, padding included: enough to keep a GPU busy; few enough for activations to stay in a CPU's cache.
DEFAULT_BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}
# Rules of what a text encoder sees of a text; the first is that of diffusers' PixArt pipelines without `clean_caption`.
CLEANINGS = ("lower", "diffusers", "strip", "none")
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

    @property
    def token_kinds(self) -> TokenKinds:
        """What the tokens of its vocabulary say of a text."""
        ...

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, cleaned and cut at `spec.max_tokens`; at least one of each."""
        ...

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return one embedding [num_tokens, D] per text, real tokens only, in the model's dtype, on the CPU.

        Values may be nan or inf where the model overflows: the caller decides what to do with the sample.
        """
        ...

    def embed_each(self, slices: Iterable[Sequence[list[int]]]) -> Iterator[list[torch.Tensor]]:
        """Yield the embeddings of each of some sequences of texts, as `tokenize` gives them.

        A GPU has begun with the next one by then.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PackedTexts:
    """Texts one behind the other without padding, and how they lie below each other with padding, as attention wants.

    Attributes:
        input_ids: of all tokens, [N].
        is_real: which places of the texts laid below each other are tokens, [B, L], with L of the longest, rounded up.
        tokens: number of the token among the N at each place [B, L]; at padding that of the text's first token.
        places: of each of the N tokens among the B * L.
    """

    input_ids: Tensor
    is_real: Tensor
    tokens: Tensor
    places: Tensor


@dataclass
class HiddenStatesEncoder:
    """A `TextEncoder` that gives the last hidden states of a model of transformers.

    A class for some kinds of model says which they are, how wide, and how their weights are loaded.

    Attributes:
        model_types: the kinds, by `model_type` of their `config.json`.
        width_key: key of their `config.json` that holds the width of an embedding.
        length_step: with padding, texts are as long as a multiple of it.
    """

    model_types: ClassVar[tuple[str, ...]]
    width_key: ClassVar[str]
    length_step: ClassVar[int] = 1

    spec: TextSpec
    model: Any
    tokenizer: Any
    batches: Batches
    known_kinds: TokenKinds | None = field(default=None, init=False, repr=False)

    @staticmethod
    def load_weights(source: ModelSource, *, dtype: torch.dtype, key: str) -> Any:
        """Load the weights, frozen and on the CPU; raises as `encoders.weights.load_pretrained` does."""
        raise NotImplementedError

    @staticmethod
    def blank_weights(config: Mapping[str, Any]) -> Any:
        """Return the model of a `config.json` on the meta device, whose weights have neither memory nor values."""
        raise NotImplementedError

    @property
    def token_kinds(self) -> TokenKinds:
        """What the tokens of the tokenizer's vocabulary say of a text."""
        if self.known_kinds is None:
            self.known_kinds = token_kinds(self.tokenizer)
        return self.known_kinds

    def compile_kernels(self) -> None:
        """Compile what pays in a long run on a GPU: nothing of a model that is transformers' own."""

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
        return self.embed(self.tokenize(texts))

    def embed(self, ids: Sequence[list[int]]) -> list[Tensor]:
        """Return the last hidden states [num_tokens, D] of each list of ids, on the CPU, in order."""
        (embeddings,) = self.embed_each([ids])
        return embeddings

    def embed_each(self, slices: Iterable[Sequence[list[int]]]) -> Iterator[list[Tensor]]:
        """Yield what `embed` gives for each of some sequences of ids.

        Texts of like length share a batch, those of two sequences never. On a GPU the next batch, or the first of the
        next sequence, is started before one is waited for.
        """
        found: list[Tensor] = []
        for order, embeddings in one_behind(self._start_each(slices)):
            found += embeddings
            if len(found) == len(order):
                places = dict(zip(order, found, strict=True))
                yield [places[index] for index in range(len(order))]
                found = []

    def _start_each(
        self, slices: Iterable[Sequence[list[int]]]
    ) -> Iterator[Callable[[], tuple[list[int], list[Tensor]]]]:
        """Start all batches; each gives the order in which its slice is encoded, and embeddings in that order."""
        for ids in slices:
            order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
            batches = self.batches.each([ids[index] for index in order], self._start)
            for finish in batches if order else [list]:
                yield lambda order=order, finish=finish: (order, finish())

    def _start(self, ids: Sequence[list[int]]) -> Callable[[], list[Tensor]]:
        import torch

        with torch.inference_mode():
            copy = HostCopy(self.hidden_states(pack(ids, self.model.device, length_step=self.length_step)))
        lengths = [len(tokens) for tokens in ids]
        return lambda: [embedding.clone() for embedding in copy.wait().split(lengths)]

    def hidden_states(self, texts: PackedTexts) -> Tensor:
        """Return the last hidden states [N, D] of packed texts: here of a model that wants them padded on the right."""
        padded = texts.input_ids[texts.tokens]  # [B, L]
        hidden = self.model(padded, attention_mask=texts.is_real.long()).last_hidden_state  # [B, L, D]
        return hidden.flatten(0, 1)[texts.places]

    @property
    def _pad_token_id(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else end


def clean_text(text: str, cleaning: str) -> str:
    """Return `text` as a text encoder sees it.

    `lower` is lower case without surrounding space, `diffusers` what PixArt-alpha was trained with (see
    `encoders.clean_caption`), `strip` leaves the case as it is, `none` leaves all as it is.
    """
    if cleaning not in CLEANINGS:
        raise ValueError(f"cleaning {cleaning} is not one of {', '.join(CLEANINGS)}")
    if cleaning == "none":
        return text
    if cleaning == "diffusers":
        from encoders.clean_caption import clean_caption

        return clean_caption(text)
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


def pack(ids: Sequence[list[int]], device: torch.device, *, length_step: int = 1) -> PackedTexts:
    """Lay texts one behind the other on a device, which takes them when it comes to it.

    With padding they are as long as the longest, rounded up to a multiple of `length_step`.
    """
    import torch

    lengths = torch.tensor([len(tokens) for tokens in ids])
    columns = torch.arange(-(-int(lengths.max()) // length_step) * length_step)
    is_real = columns < lengths[:, None]  # [B, L]
    starts = lengths.cumsum(0) - lengths
    return PackedTexts(
        input_ids=to_device(torch.tensor([token for tokens in ids for token in tokens]), device),
        is_real=to_device(is_real, device),
        tokens=to_device(starts[:, None] + torch.where(is_real, columns, 0), device),
        places=to_device(is_real.flatten().nonzero()[:, 0], device),
    )

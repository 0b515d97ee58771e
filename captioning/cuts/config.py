"""A pass with `engine = "cut"`: of which captions it is cut, and by which rule."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from captioning.config import QualityConfig
from pipelines.recipe import Decides, TableConfig


class CutConfig(TableConfig):
    """`[captioning.passes.<name>]` with `engine = "cut"`: whole sentences of other captions, chosen by rule.

    What is not bound is not looked at. Bounds hold together; the first sentence stays, however long it is.
    """

    engine: Literal["cut"] = Field(default="cut", description="No model: the text of other captions is cut")
    of: Decides[str] = Field(
        default="caption", description="Captions that are cut: caption, another column of given ones, or a pass"
    )
    max_sentences: Decides[int | None] = Field(default=None, ge=1, description="First sentences that are kept, at most")
    max_words: Decides[int | None] = Field(
        default=None, ge=1, description="Words of these, at most; in scripts without spaces each letter counts as one"
    )
    max_tokens: Decides[int | None] = Field(default=None, ge=1, description="Tokens of these, at most")
    tokenizer: str | None = Field(
        default=None,
        description="Hub id or local folder of the model whose tokens are counted; null = the one that wrote the "
        "captions, where it is a model of transformers",
    )
    tokenizer_revision: str | None = Field(default=None, description="Commit of that hub model")
    supported: Decides[bool] = Field(
        default=False, description="Drop the sentences that the columns of claims mark as unsupported, before bounds"
    )
    shards: Sequence[str] | None = Field(
        default=None, min_length=1, description="Names of the shards (fnmatch); null = those of the captions it is of"
    )
    quality: QualityConfig = Field(default=QualityConfig(), description="What is flagged")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.supported and (self.max_sentences, self.max_words, self.max_tokens) == (None, None, None):
            raise ValueError("it cuts nothing: set max_sentences, max_words or max_tokens, or supported")
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ValueError("tokenizer_revision is that of tokenizer, which is null")
        return self

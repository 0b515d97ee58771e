"""The recipe table `[captioning.claims]`: what is asked about a caption, of which model, and what counts as support."""

import string
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from encoders.yes_no_keys import YesNoKeys
from pipelines.recipe import Decides

QUESTION = 'Is the following true of the image? "{claim}" Answer yes or no.'


class ClaimsConfig(YesNoKeys):
    """`[captioning.claims]`; device, dtype, image limits, server and vLLM are those of `[captioning]`."""

    of: Sequence[str] = Field(
        default=("caption",), min_length=1, description="Columns of captions whose claims are asked back"
    )
    engine: str | None = Field(
        default=None,
        pattern="^(transformers|generate|vllm|openai)$",
        description="What asks, as captioning.engine; null = that engine",
    )
    model: str | None = Field(
        default=None,
        description="Hub id or local folder of the model that is asked, with openai its name at the server; null = "
        "captioning.model",
    )
    revision: str | None = Field(default=None, description="Commit of that hub model, where `model` is not null")
    question: Decides[str] = Field(
        default=QUESTION, description="What is asked about each claim, which is filled in for {claim}"
    )
    split: Decides[Literal["clauses", "sentences"]] = Field(
        default="clauses",
        description="What a claim is: a clause or part of a list of an English sentence, or a whole sentence; of "
        "captions in other languages it is the sentence",
    )
    min_answer_probability: Decides[float] = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Where yes and no together are less likely than this, the answer is neither, and the claim unknown",
    )
    threshold: Decides[float] = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Claims whose yes has a smaller share of yes and no are unsupported; changing it asks nothing anew",
    )
    batch_size: int = Field(default=32, ge=1, description="Claims read at a time by engine generate")

    @field_validator("question")
    @classmethod
    def _check_question(cls, question: str) -> str:
        fields = [field for _, field, _, _ in string.Formatter().parse(question) if field is not None]
        if set(fields) != {"claim"} or "<image>" in question:
            raise ValueError("the question holds {claim}, and no other placeholder nor <image>")
        return question

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.of)) < len(self.of):
            raise ValueError(f"of = {list(self.of)} names a column twice")
        if self.revision is not None and self.model is None:
            raise ValueError("revision is that of claims.model, which is null: captioning.revision goes with its model")
        return self

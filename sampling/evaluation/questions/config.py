"""`[evaluation.questions]`: who is asked about the images, and how."""

import string
from typing import Annotated, Literal

from pydantic import Field, field_validator

from encoders.chat_config import ChatServerConfig
from encoders.yes_no_keys import YesNoKeys
from pipelines.recipe import Decides

DECIDES_MODE = "decides whether an answer is a likelihood or a word"


class QuestionsConfig(YesNoKeys):
    """`[evaluation.questions]`, of `TASK=questions`; the benchmark is evaluation.prompt_set."""

    model: str | None = Field(default=None, description="Name of the vision-language model at the server")
    server: ChatServerConfig = Field(default=ChatServerConfig(), description="The chat server that is asked")
    file: str | None = Field(
        default=None,
        description="Questions of the recipe's own prompts, in the layout of geneval2_data.jsonl; `{run}` stands for "
        "the run's folder. Benchmarks have theirs in evaluation.prompts",
    )
    wording: Decides[str] = Field(
        default="{question} Answer in one word.", description="What is sent, with a question filled in for {question}"
    )
    answers: Annotated[Literal["auto", "soft", "hard"], DECIDES_MODE] = Field(
        default="auto",
        description="soft: how likely the right answer is, of the server's likelihoods; hard: whether it is what is "
        "said; auto: soft where the server tells likelihoods",
    )
    min_answer_probability: Decides[float] = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Where all answers that are understood are together less likely than this, it is none of them",
    )
    max_unknown_fraction: float = Field(
        default=0.05, ge=0, le=1, description="Fraction of questions without an answer above which there is no score"
    )

    @field_validator("wording")
    @classmethod
    def _check_wording(cls, wording: str) -> str:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(wording) if field is not None]
        except ValueError as error:
            raise ValueError(f"the wording {wording!r} is no format: {error}") from None
        if fields != ["question"] or "<image>" in wording:
            raise ValueError("the wording holds {question} once, and no other placeholder nor <image>")
        return wording

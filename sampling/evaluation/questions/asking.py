"""Questions about images to a chat server, and what its answers say: likelihoods where it tells them, else words."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from encoders import chat
from encoders.answers import NUMBER_CHOICES, Answers, Choices
from encoders.chat import ChatClient, Decoding, NoAnswer
from encoders.chat_server import ChatServer, ServerError, require_server
from pipelines.engine.progress import get_logger
from sampling.evaluation.questions.config import QuestionsConfig
from sampling.evaluation.questions.wording import Question

Mode = Literal["soft", "hard"]

TABLE = "evaluation.questions"
# As many as vLLM gives unless it is started with more, and as OpenAI gives at all.
NUM_ALTERNATIVES = 20
HARD_TOKENS = 16
NOT_UNDERSTOOD = "not_understood"
SERVER_FAILED = "server_failed"  # no fault of question or image
CHECK_QUESTION = "Is this image red?"
CHECK_PIXELS = 64
# More digits of a likelihood depend on what it was computed beside.
LIKELIHOOD_DIGITS = 4

log = get_logger("evaluation")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an answer says.

    Attributes:
        said: the choice: `yes`, `no` or a number's word; None where it is none of them.
        share: how likely the right choice is, of all choices of the question; None of hard answers and unknown ones.
        mass: how likely any choice is; None of hard answers and of those that did not come.
        text: of a hard answer what was written, of a soft one its likeliest token.
        model: what the server calls itself.
        reject: why the question has no answer: `not_understood`, `refused_by_server` or `server_failed`.
    """

    said: str | None = None
    share: float | None = None
    mass: float | None = None
    text: str = ""
    model: str = ""
    reject: str | None = None


class Asker:
    """Asks a chat server; answers are soft or hard for all of its questions."""

    def __init__(self, config: QuestionsConfig, *, api_key: str) -> None:
        assert config.model is not None
        self._config = config
        self._server = ChatServer(config=config.server, table=TABLE, model=config.model, api_key=api_key)
        self._client = ChatClient(self._server)
        self._answers = Answers(
            yes=tuple(config.yes), no=tuple(config.no), min_probability=config.min_answer_probability
        )

    def settle_mode(self, known: Mode | None) -> Mode:
        """Wait for the server, and return how its answers are taken; `known` is that of answers made before.

        Raises:
            ServerError: it is not there, fails, or tells no likelihoods where they are wanted.
        """
        require_server(self._server)
        wanted = known or self._config.answers
        if wanted == "hard":
            return "hard"
        grey = Image.new("RGB", (CHECK_PIXELS, CHECK_PIXELS), "grey")
        question = self._client.question(grey, self._config.wording.format(question=CHECK_QUESTION), seed=0)
        (answer,) = self._client.ask_all([question], _decoding("soft"))
        if not isinstance(answer, NoAnswer) and answer.alternatives:
            return "soft"
        if isinstance(answer, NoAnswer) and answer.reason == SERVER_FAILED:
            raise ServerError(f"{self._server.address} has failed at a first question: {answer.detail}")
        reason = answer.detail if isinstance(answer, NoAnswer) else "it answers without them"
        if wanted == "auto":
            log.info(f"{self._server.address} tells no likelihoods of first tokens ({reason}): answers are hard")
            return "hard"
        was = "the answers that are there have them" if known else f'{TABLE}.answers = "soft" wants them'
        raise ServerError(
            f"{self._server.address} tells no likelihoods of first tokens (logprobs, with {NUM_ALTERNATIVES} "
            f'top_logprobs: {reason}), and {was}: take a server that does, or set {TABLE}.answers = "hard"'
        )

    def ask(self, pictures: Iterable[tuple[Image.Image, Sequence[Question]]], *, mode: Mode) -> list[list[Reply]]:
        """Return, for each image in order, the replies to its questions.

        Raises:
            ServerError: the server cannot be used, or has been silent for too long.
        """
        asked: list[list[Question]] = []

        def questions() -> Iterator[chat.Question]:
            for image, about in pictures:
                asked.append(list(about))
                texts = [self._config.wording.format(question=question.text) for question in about]
                first = self._client.question(image, texts[0], seed=0)
                yield first
                yield from (self._client.another(first, text) for text in texts[1:])

        answers = iter(self._client.ask_all(questions(), _decoding(mode)))
        return [[self._reply(question, next(answers), mode=mode) for question in about] for about in asked]

    def _reply(self, question: Question, answer: chat.Answer | NoAnswer, *, mode: Mode) -> Reply:
        if isinstance(answer, NoAnswer):
            return Reply(text=answer.detail, reject=answer.reason)
        choices = self._answers.choices if question.answer in ("yes", "no") else NUMBER_CHOICES
        if mode == "soft":
            if answer.alternatives is None:
                raise ServerError(f"{self._server.address} has told likelihoods, and tells none any more")
            return self._soft(question, choices, answer)
        said = choices.said_in(answer.text)
        return Reply(said=said, text=answer.text, model=answer.model, reject=None if said else NOT_UNDERSTOOD)

    def _soft(self, question: Question, choices: Choices, answer: chat.Answer) -> Reply:
        likely = choices.likelihoods(answer.alternatives or ())
        mass = sum(likely.values())
        token = max(answer.alternatives or (("", 0.0),), key=lambda found: found[1])[0]
        if not mass >= self._config.min_answer_probability:  # NaN, too
            return Reply(mass=_digits(mass), text=token, model=answer.model, reject=NOT_UNDERSTOOD)
        return Reply(
            said=max(likely, key=lambda choice: likely[choice]),
            share=_digits(likely[question.answer] / mass),
            mass=_digits(mass),
            text=token,
            model=answer.model,
        )


def _decoding(mode: Mode) -> Decoding:
    if mode == "soft":
        return Decoding(max_tokens=1, temperature=0.0, num_alternatives=NUM_ALTERNATIVES)
    return Decoding(max_tokens=HARD_TOKENS, temperature=0.0)


def _digits(value: float) -> float:
    # Significant ones: of a geometric mean the small likelihoods decide.
    return float(f"{value:.{LIKELIHOOD_DIGITS}g}")

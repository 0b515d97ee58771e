"""Questions about images to a server with OpenAI's chat interface: vLLM, SGLang, LMDeploy, `transformers serve`.

The server batches; here a bounded number of requests is kept in flight, and what fails is told apart: the server is
away (wait for it), one question has no answer (say why), or none has (stop).
"""

import base64
import io
import re
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import openai
from PIL import Image

from encoders.chat_server import (
    ChatServer,
    Patience,
    ServerError,
    Stopped,
    connect,
    describe,
    require_json,
    wrong_key,
)
from pipelines.raw.images import shrink

# Servers fill an image in where their template says so; a text must not say so too.
SPECIAL_TOKENS = re.compile(r"<image>|</?s>|<unk>|<pad>|<\|[^<>|]{1,40}\|>")
# Seeds are 64 bits with some servers, and 32 with others.
SEED_MASK = 2**31 - 1
CHECK_PROMPT = "What is this?"
CHECK_PIXELS = 64


@dataclass(frozen=True, kw_only=True)
class Question:
    """What goes over the line: an image as data URL, the text, and the seed; `ChatClient.question` makes one."""

    image_url: str
    text: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the server decodes: tokens at most, temperature (0 is greedy), repetition penalty as transformers has it.

    With `num_alternatives` it is asked what else the first token could have been: so many of the likeliest ones.
    """

    max_tokens: int
    temperature: float
    repetition_penalty: float = 1.0
    num_alternatives: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said; `num_tokens` as the server counts them, None of one that does not report it.

    `finish_reason` is `length` when it was cut at `max_tokens`. `alternatives` are the likeliest first tokens with
    their log-probabilities, None where the server does not tell any. `model` is what the server calls itself.
    """

    text: str
    num_tokens: int | None
    finish_reason: Literal["stop", "length"]
    alternatives: tuple[tuple[str, float], ...] | None = None
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class NoAnswer:
    """Why one question has no answer, whatever becomes of the others: `refused_by_server` or `server_failed`."""

    reason: str
    detail: str


def image_data_url(image: Image.Image, *, short_side_pixels: int = 0) -> str:
    """Return an image as lossless data URL; a larger one with this short side, 0 leaves it as it is."""
    image = shrink(image, short_side_pixels=short_side_pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class ChatClient:
    """A server, asked over HTTP, with a bounded number of questions in flight."""

    def __init__(self, server: ChatServer) -> None:
        self._server = server
        self._config = server.config
        self._client = connect(server)
        self._patience = Patience(server)

    def question(self, image: Image.Image, text: str, *, seed: int) -> Question:
        """Return a question with its image as lossless data URL; may be called from several threads."""
        return Question(
            image_url=image_data_url(image, short_side_pixels=self._config.image_short_side_pixels),
            text=SPECIAL_TOKENS.sub(" ", text),
            seed=seed & SEED_MASK,
        )

    def another(self, question: Question, text: str) -> Question:
        """Return a question with another text about the image of `question`, which is not encoded again."""
        return replace(question, text=SPECIAL_TOKENS.sub(" ", text))

    def ask_all(self, questions: Iterable[Question], decoding: Decoding) -> list[Answer | NoAnswer]:
        """Return one answer per question, in order; takes the next question when one of those in flight is answered.

        Raises:
            ServerError: the server cannot be used, or has been silent for too long; this ends all questions.
        """
        free = threading.BoundedSemaphore(self._config.num_requests)
        futures: list[Future[Answer | NoAnswer]] = []
        failed: list[Exception] = []

        def ask(question: Question) -> Answer | NoAnswer:
            try:
                return self._ask(question, decoding)
            except Stopped:
                raise
            except Exception as error:
                failed.append(error)
                self._patience.stop()
                raise
            finally:
                free.release()

        with ThreadPoolExecutor(self._config.num_requests, thread_name_prefix="request") as pool:
            try:
                for question in questions:
                    free.acquire()
                    if failed:
                        break
                    futures.append(pool.submit(ask, question))
            except BaseException:
                # Nobody waits for an answer any more: what is in flight must not wait for the server either.
                self._patience.stop()
                raise
        if failed:
            raise failed[0]
        return [future.result() for future in futures]

    def _ask(self, question: Question, decoding: Decoding) -> Answer | NoAnswer:
        """Ask until there is an answer, a refusal, or no patience left."""
        attempt = num_own_faults = 0
        is_last_try = False
        while True:
            suggested_seconds = None
            try:
                answer = self._send(question, decoding)
                self._patience.heard()
                return answer
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise wrong_key(self._server, error) from None
            except openai.NotFoundError as error:
                raise ServerError(
                    f"{self._server.address} does not know {self._server.table}.model {self._server.model!r}, or is "
                    f"not the address of a chat interface (it ends in /v1): {describe(error)}"
                ) from None
            except openai.APIStatusError as error:
                reason = describe(error)
                is_own_fault = error.status_code == 500
                suggested_seconds = _retry_after_seconds(error)
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    self._patience.heard()
                    return self._refuse(decoding, reason)
            except openai.APITimeoutError as error:
                reason, is_own_fault = describe(error), True
            except openai.APIConnectionError as error:
                reason, is_own_fault = describe(error), False
            except openai.APIError as error:
                # An answer that is none of OpenAI's.
                reason, is_own_fault = describe(error), True
            if is_own_fault and is_last_try:
                return NoAnswer(reason="server_failed", detail=reason)
            # A server that answers about another image, and then fails on this one again, will not do better next time.
            num_own_faults += is_own_fault
            is_last_try = num_own_faults >= self._config.max_attempts - 1 and self._is_well()
            if is_last_try:
                self._patience.heard()
                continue
            self._patience.wait(attempt, reason, suggested_seconds=suggested_seconds)
            attempt += 1

    def _send(self, question: Question, decoding: Decoding) -> Answer | NoAnswer:
        content: Any = [
            {"type": "image_url", "image_url": {"url": question.image_url}},
            {"type": "text", "text": question.text},
        ]
        raw = self._client.chat.completions.with_raw_response.create(
            model=self._server.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            seed=question.seed,
            # Servers may read another default from the model's generation_config.json.
            top_p=1.0 if decoding.temperature > 0 else openai.omit,
            logprobs=True if decoding.num_alternatives else openai.omit,
            top_logprobs=decoding.num_alternatives or openai.omit,
            **self._penalty(decoding.repetition_penalty),
        )
        require_json(self._server, raw.text)
        answer = raw.parse()
        if not answer.choices:
            return NoAnswer(reason="server_failed", detail="an answer without choices")
        choice = answer.choices[0]
        if choice.finish_reason == "content_filter":
            return NoAnswer(reason="refused_by_server", detail="content_filter")
        # Half of a character that was cut in two, which JSON can say and no file can hold, becomes a question mark.
        text = (choice.message.content or "").encode("utf-8", "replace").decode()
        return Answer(
            text=text.strip(),
            num_tokens=answer.usage.completion_tokens if answer.usage is not None else None,
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            alternatives=_alternatives(choice.logprobs),
            model=answer.model or "",
        )

    def _penalty(self, repetition_penalty: float) -> dict[str, Any]:
        if repetition_penalty == 1.0:
            return {}
        if self._config.penalty_parameter == "frequency_penalty":
            return {"frequency_penalty": repetition_penalty - 1.0}
        return {"extra_body": {"repetition_penalty": repetition_penalty}}

    def _refuse(self, decoding: Decoding, reason: str) -> NoAnswer:
        if decoding.repetition_penalty != 1.0:
            # Without the penalty the same question was answered a moment ago.
            raise ServerError(
                f"{self._server.table}.server.penalty_parameter {self._config.penalty_parameter!r} is not what "
                f"{self._config.base_url} understands ({reason}); the other one may be, or ask without a penalty "
                f"({self._server.table}.loop_retry.repetition_penalty = 1.0)"
            )
        return NoAnswer(reason="refused_by_server", detail=reason)

    def _is_well(self) -> bool:
        grey = Image.new("RGB", (CHECK_PIXELS, CHECK_PIXELS), "grey")
        try:
            self._send(self.question(grey, CHECK_PROMPT, seed=0), Decoding(max_tokens=1, temperature=0.0))
        except openai.OpenAIError:
            return False
        return True


def _alternatives(logprobs: Any) -> tuple[tuple[str, float], ...] | None:
    if logprobs is None or logprobs.content is None:
        return None
    first = next(iter(logprobs.content), None)
    return tuple((found.token, found.logprob) for found in first.top_logprobs) if first is not None else ()


def _retry_after_seconds(error: openai.APIStatusError) -> float | None:
    value = error.response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None

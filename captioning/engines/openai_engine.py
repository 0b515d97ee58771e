"""The engine for servers with OpenAI's chat interface: vLLM, SGLang, LMDeploy, `transformers serve`.

The server batches; here a bounded number of requests is kept in flight, and what fails is told apart: the server is
away (wait for it), one image cannot be captioned (reject it), or nothing can (say so and stop).
"""

import base64
import io
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
from PIL import Image

from captioning.config import CaptioningConfig
from captioning.engines.protocol import PROBE_TOKENS, Caption, Refusal, Request
from captioning.engines.server import Patience, ServerError, Stopped, connect, describe, require_json, wrong_key

# Servers fill an image in where their template says so; an alt text must not say so too.
SPECIAL_TOKENS = re.compile(r"<image>|</?s>|<unk>|<pad>|<\|[^<>|]{1,40}\|>")
# Seeds are 64 bits with some servers, and 32 with others.
SEED_MASK = 2**31 - 1
CHECK_PROMPT = "What is this?"
CHECK_PIXELS = 64


@dataclass(frozen=True, kw_only=True)
class ServerPrompt:
    """What goes over the line: an image as data URL, the text, and the seed."""

    image_url: str
    text: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    max_tokens: int
    temperature: float
    repetition_penalty: float = 1.0


class OpenAIEngine:
    """A chat server, asked over HTTP; see `CaptionEngine` for the three methods."""

    # Servers batch what comes in together, in half precision as a rule.
    is_exact = False

    def __init__(self, config: CaptioningConfig, *, api_key: str) -> None:
        self._config = config
        self._server = config.server
        self._client = connect(config.server, api_key)
        self._patience = Patience(config.server)

    def prepare(self, requests: Sequence[Request]) -> list[ServerPrompt]:
        """Return each request with its image as lossless data URL; called from several threads."""
        return [
            ServerPrompt(
                image_url=self._data_url(request.image),
                text=SPECIAL_TOKENS.sub(" ", request.prompt),
                seed=request.seed & SEED_MASK,
            )
            for request in requests
        ]

    def caption(self, prepared: Iterable[ServerPrompt], *, repetition_penalty: float = 1.0) -> list[Caption | Refusal]:
        """Return one caption or refusal per prompt, in order."""
        decoding = _Decoding(
            max_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            repetition_penalty=repetition_penalty,
        )
        return self._ask_all(prepared, decoding)

    def probe(self, prepared: Iterable[ServerPrompt]) -> list[Caption | Refusal]:
        """Return greedy captions of at most `PROBE_TOKENS` tokens, asked for at the same time."""
        return self._ask_all(
            prepared, _Decoding(max_tokens=min(PROBE_TOKENS, self._config.max_new_tokens), temperature=0.0)
        )

    def _data_url(self, image: Image.Image) -> str:
        wanted, short = self._server.image_short_side_pixels, min(image.size)
        if 0 < wanted < short:
            # As the processor of LLaVA-1.5 would do it at the other end: the long side is rounded down.
            size = (wanted * image.width // short, wanted * image.height // short)
            image = image.resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    def _ask_all(self, prepared: Iterable[ServerPrompt], decoding: _Decoding) -> list[Caption | Refusal]:
        """Keep `num_requests` in flight; the first error that ends the job ends them all."""
        free = threading.BoundedSemaphore(self._server.num_requests)
        futures: list[Future[Caption | Refusal]] = []
        failed: list[Exception] = []

        def ask(prompt: ServerPrompt) -> Caption | Refusal:
            try:
                return self._ask(prompt, decoding)
            except Stopped:
                raise
            except Exception as error:
                failed.append(error)
                self._patience.stop()
                raise
            finally:
                free.release()

        with ThreadPoolExecutor(self._server.num_requests, thread_name_prefix="request") as pool:
            try:
                for prompt in prepared:
                    free.acquire()
                    if failed:
                        break
                    futures.append(pool.submit(ask, prompt))
            except BaseException:
                # Nobody waits for an answer any more: what is in flight must not wait for the server either.
                self._patience.stop()
                raise
        if failed:
            raise failed[0]
        return [future.result() for future in futures]

    def _ask(self, prompt: ServerPrompt, decoding: _Decoding) -> Caption | Refusal:
        """Ask until there is an answer, a refusal, or no patience left."""
        attempt = num_own_faults = 0
        is_last_try = False
        while True:
            suggested_seconds = None
            try:
                caption = self._send(prompt, decoding)
                self._patience.heard()
                return caption
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise wrong_key(self._server, error) from None
            except openai.NotFoundError as error:
                raise ServerError(
                    f"captioning.server.base_url {self._server.base_url} does not know captioning.model "
                    f"{self._config.model!r}, or is not the address of a chat interface (it ends in /v1): "
                    f"{describe(error)}"
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
                return Refusal(reason="server_failed", detail=reason)
            # A server that answers about another image, and then fails on this one again, will not do better next time.
            num_own_faults += is_own_fault
            is_last_try = num_own_faults >= self._server.max_attempts - 1 and self._is_well()
            if is_last_try:
                self._patience.heard()
                continue
            self._patience.wait(attempt, reason, suggested_seconds=suggested_seconds)
            attempt += 1

    def _send(self, prompt: ServerPrompt, decoding: _Decoding) -> Caption | Refusal:
        content: Any = [
            {"type": "image_url", "image_url": {"url": prompt.image_url}},
            {"type": "text", "text": prompt.text},
        ]
        raw = self._client.chat.completions.with_raw_response.create(
            model=self._config.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            seed=prompt.seed,
            # Servers may read another default from the model's generation_config.json.
            top_p=1.0 if decoding.temperature > 0 else openai.omit,
            **self._penalty(decoding.repetition_penalty),
        )
        require_json(self._server, raw.text)
        answer = raw.parse()
        if not answer.choices:
            return Refusal(reason="server_failed", detail="an answer without choices")
        choice = answer.choices[0]
        if choice.finish_reason == "content_filter":
            return Refusal(reason="refused_by_server", detail="content_filter")
        # Half of a character that was cut in two, which JSON can say and no file can hold, becomes a question mark.
        text = (choice.message.content or "").encode("utf-8", "replace").decode()
        return Caption(
            text=text.strip(),
            num_tokens=answer.usage.completion_tokens if answer.usage is not None else None,
            finish_reason="length" if choice.finish_reason == "length" else "stop",
        )

    def _penalty(self, repetition_penalty: float) -> dict[str, Any]:
        if repetition_penalty == 1.0:
            return {}
        if self._server.penalty_parameter == "frequency_penalty":
            return {"frequency_penalty": repetition_penalty - 1.0}
        return {"extra_body": {"repetition_penalty": repetition_penalty}}

    def _refuse(self, decoding: _Decoding, reason: str) -> Refusal:
        if decoding.repetition_penalty != 1.0:
            # Without the penalty the same image was captioned a moment ago.
            raise ServerError(
                f"captioning.server.penalty_parameter {self._server.penalty_parameter!r} is not what "
                f"{self._server.base_url} understands ({reason}); the other one may be, or switch the second try off "
                "with captioning.loop_retry.repetition_penalty = 1.0"
            )
        return Refusal(reason="refused_by_server", detail=reason)

    def _is_well(self) -> bool:
        grey = Image.new("RGB", (CHECK_PIXELS, CHECK_PIXELS), "grey")
        prompt = ServerPrompt(image_url=self._data_url(grey), text=CHECK_PROMPT, seed=0)
        try:
            self._send(prompt, _Decoding(max_tokens=1, temperature=0.0))
        except openai.OpenAIError:
            return False
        return True


def _retry_after_seconds(error: openai.APIStatusError) -> float | None:
    value = error.response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None

"""The other end of the line: who the server is, whether it is there, and how long to wait when it is not."""

import json
import random
import threading
import time
from collections.abc import Callable

import openai

from captioning.config import ServerConfig
from pipelines.engine.progress import get_logger

log = get_logger("captioning")

# What servers without keys are sent, as their own examples do.
NO_KEY = "EMPTY"
FIRST_BACKOFF_SECONDS = 0.5
SAY_AGAIN_SECONDS = 30.0


class ServerError(ValueError):
    """The server cannot be used, whatever it is asked; says why."""


class Stopped(Exception):
    """Another request has ended the job, so this one is not worth waiting for."""


def connect(server: ServerConfig, api_key: str) -> openai.OpenAI:
    """Return a client that tries once: what may be tried again, and for how long, is decided here."""
    return openai.OpenAI(
        base_url=server.base_url, api_key=api_key or NO_KEY, timeout=server.timeout_seconds, max_retries=0
    )


def describe(error: openai.OpenAIError) -> str:
    """Return the one line that a server's error comes down to."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0][:300]}"


def require_server(server: ServerConfig, api_key: str) -> None:
    """Wait for the server to answer at all, before any work starts.

    Raises:
        ServerError: it refuses the key, is no chat interface, or has not answered for `patience_seconds`.
    """
    client = connect(server, api_key).with_options(timeout=min(10.0, server.timeout_seconds))
    patience = Patience(server)
    attempt, said_seconds = 0, -SAY_AGAIN_SECONDS
    while True:
        try:
            require_json(server, client.models.with_raw_response.list().text)
            return
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise wrong_key(server, error) from None
        except openai.APIStatusError as error:
            # Not every server lists its models; one that is starting says 502, 503 or 504 through its proxy.
            if error.status_code not in (502, 503, 504):
                return
            reason = describe(error)
        except openai.APIConnectionError as error:
            reason = describe(error)
        if time.monotonic() - said_seconds >= SAY_AGAIN_SECONDS:
            said_seconds = time.monotonic()
            log.info(f"{server.base_url} does not answer ({reason}); waiting up to {server.patience_seconds:.0f} s")
        patience.wait(attempt, reason)
        attempt += 1


def wrong_key(server: ServerConfig, error: openai.APIStatusError) -> ServerError:
    """Return the error of a refused key, which names the variable and not the key."""
    return ServerError(
        f"captioning.server.base_url {server.base_url} refuses the key in the environment variable "
        f"{server.api_key_variable} (captioning.server.api_key_variable): {describe(error)}"
    )


def require_json(server: ServerConfig, text: str) -> None:
    """Refuse a page that calls itself a success: the client would hand its text on as the answer.

    Raises:
        ServerError: `text` is no JSON.
    """
    try:
        json.loads(text)
    except ValueError:
        raise ServerError(
            f"captioning.server.base_url {server.base_url} is not the address of a chat interface (it ends in /v1), or "
            f"a login page stands before it: it answers with no JSON, but {text[:100]!r}"
        ) from None


class Patience:
    """How long a silent server is waited for; shared by all requests in flight.

    The clock runs from the first failure after an answer, so that time spent elsewhere does not count.
    """

    def __init__(self, server: ServerConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._clock = clock
        self._lock = threading.Lock()
        self._silent_since: float | None = None
        self._stop = threading.Event()

    def heard(self) -> None:
        """Note that the server has answered."""
        with self._lock:
            self._silent_since = None

    def stop(self) -> None:
        """Wake everybody who waits: the job is over."""
        self._stop.set()

    def wait(self, attempt: int, reason: str, *, suggested_seconds: float | None = None) -> None:
        """Sleep before try number `attempt` + 2; twice as long each time, with jitter, within the recipe's bound.

        Raises:
            ServerError: nothing has been heard for `captioning.server.patience_seconds`.
            Stopped: `stop` was called.
        """
        with self._lock:
            now = self._clock()
            self._silent_since = now if self._silent_since is None else self._silent_since
            silent_seconds = now - self._silent_since
        if silent_seconds > self._server.patience_seconds:
            raise ServerError(
                f"captioning.server.base_url {self._server.base_url} has not answered for {silent_seconds:.0f} s "
                f"(captioning.server.patience_seconds {self._server.patience_seconds:g}; {reason}); what is done "
                "stays: bring the server back and run the same command again"
            )
        if self._stop.wait(self.backoff_seconds(attempt, suggested_seconds)):
            raise Stopped

    def backoff_seconds(self, attempt: int, suggested_seconds: float | None = None) -> float:
        """Return a wait between half of and the whole of the bound, so that requests do not come back all at once."""
        wanted = suggested_seconds if suggested_seconds is not None else FIRST_BACKOFF_SECONDS * 2.0 ** min(attempt, 30)
        return min(wanted, self._server.max_backoff_seconds) * random.uniform(0.5, 1.0)

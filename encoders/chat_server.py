"""The other end of the line: who the server is, whether it is there, and how long to wait when it is not."""

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import openai

from encoders.chat_config import ChatServerConfig
from errors import UserError
from pipelines.engine.progress import get_logger

log = get_logger("encoders")

# What servers without keys are sent, as their own examples do.
NO_KEY = "EMPTY"
FIRST_BACKOFF_SECONDS = 0.5
SAY_AGAIN_SECONDS = 30.0


class ServerError(UserError):
    """The server cannot be used, whatever it is asked; says why."""


class Stopped(Exception):
    """Another request has ended the job, so this one is not worth waiting for."""


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A server, and how the recipe speaks of it.

    Attributes:
        table: of the recipe, such as `captioning`: errors name `captioning.server.base_url` and `captioning.model`.
        model: its name at the server.
        api_key: from the environment of the driver; it is in no file.
    """

    config: ChatServerConfig
    table: str
    model: str
    api_key: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """The key of its address and the address, as errors begin."""
        return f"{self.table}.server.base_url {self.config.base_url}"


def connect(server: ChatServer) -> openai.OpenAI:
    """Return a client that tries once: what may be tried again, and for how long, is decided here."""
    config = server.config
    return openai.OpenAI(
        base_url=config.base_url, api_key=server.api_key or NO_KEY, timeout=config.timeout_seconds, max_retries=0
    )


def describe(error: openai.OpenAIError) -> str:
    """Return the one line that a server's error comes down to."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0][:300]}"


def require_server(server: ChatServer) -> None:
    """Wait for the server to answer at all, before any work starts.

    Raises:
        ServerError: it refuses the key, is no chat interface, or has not answered for `patience_seconds`.
    """
    config = server.config
    client = connect(server).with_options(timeout=min(10.0, config.timeout_seconds))
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
            log.info(f"{config.base_url} does not answer ({reason}); waiting up to {config.patience_seconds:.0f} s")
        patience.wait(attempt, reason)
        attempt += 1


def wrong_key(server: ChatServer, error: openai.APIStatusError) -> ServerError:
    """Return the error of a refused key, which names the variable and not the key."""
    return ServerError(
        f"{server.address} refuses the key in the environment variable "
        f"{server.config.api_key_variable} ({server.table}.server.api_key_variable): {describe(error)}"
    )


def require_json(server: ChatServer, text: str) -> None:
    """Refuse a page that calls itself a success: the client would hand its text on as the answer.

    Raises:
        ServerError: `text` is no JSON.
    """
    try:
        json.loads(text)
    except ValueError:
        raise ServerError(
            f"{server.address} is not the address of a chat interface (it ends in /v1), or a login page stands before "
            f"it: it answers with no JSON, but {text[:100]!r}"
        ) from None


class Patience:
    """How long a silent server is waited for; shared by all requests in flight.

    The clock runs from the first failure after an answer, so that time spent elsewhere does not count.
    """

    def __init__(self, server: ChatServer, *, clock: Callable[[], float] = time.monotonic) -> None:
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
            ServerError: nothing has been heard for `patience_seconds` of the server.
            Stopped: `stop` was called.
        """
        with self._lock:
            now = self._clock()
            self._silent_since = now if self._silent_since is None else self._silent_since
            silent_seconds = now - self._silent_since
        if silent_seconds > self._server.config.patience_seconds:
            raise ServerError(
                f"{self._server.address} has not answered for {silent_seconds:.0f} s "
                f"({self._server.table}.server.patience_seconds {self._server.config.patience_seconds:g}; {reason}); "
                "what is done stays: bring the server back and run the same command again"
            )
        if self._stop.wait(self.backoff_seconds(attempt, suggested_seconds)):
            raise Stopped

    def backoff_seconds(self, attempt: int, suggested_seconds: float | None = None) -> float:
        """Return a wait between half of and the whole of the bound, so that requests do not come back all at once."""
        wanted = suggested_seconds if suggested_seconds is not None else FIRST_BACKOFF_SECONDS * 2.0 ** min(attempt, 30)
        return min(wanted, self._server.config.max_backoff_seconds) * random.uniform(0.5, 1.0)

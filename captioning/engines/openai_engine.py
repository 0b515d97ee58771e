"""The engine for servers with OpenAI's chat interface: captions are answers to questions about images."""

from collections.abc import Iterable, Sequence

from captioning.config import CaptioningConfig
from captioning.engines.protocol import PROBE_TOKENS, Caption, Refusal, Request
from encoders.chat import ChatClient, Decoding, NoAnswer, Question
from encoders.chat_server import ChatServer


class OpenAIEngine:
    """A chat server, asked over HTTP; see `CaptionEngine` for the three methods."""

    # Servers batch what comes in together, in half precision as a rule.
    is_exact = False

    def __init__(self, config: CaptioningConfig, *, api_key: str) -> None:
        self._config = config
        self._client = ChatClient(chat_server(config, api_key))

    def prepare(self, requests: Sequence[Request]) -> list[Question]:
        """Return each request with its image as lossless data URL; called from several threads."""
        return [self._client.question(request.image, request.prompt, seed=request.seed) for request in requests]

    def caption(self, prepared: Iterable[Question], *, repetition_penalty: float = 1.0) -> list[Caption | Refusal]:
        """Return one caption or refusal per prompt, in order."""
        decoding = Decoding(
            max_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            repetition_penalty=repetition_penalty,
        )
        return self._ask(prepared, decoding)

    def probe(self, prepared: Iterable[Question]) -> list[Caption | Refusal]:
        """Return greedy captions of at most `PROBE_TOKENS` tokens, asked for at the same time."""
        decoding = Decoding(max_tokens=min(PROBE_TOKENS, self._config.max_new_tokens), temperature=0.0)
        return self._ask(prepared, decoding)

    def _ask(self, prepared: Iterable[Question], decoding: Decoding) -> list[Caption | Refusal]:
        return [
            Refusal(reason=answer.reason, detail=answer.detail)
            if isinstance(answer, NoAnswer)
            else Caption(text=answer.text, num_tokens=answer.num_tokens, finish_reason=answer.finish_reason)
            for answer in self._client.ask_all(prepared, decoding)
        ]


def chat_server(config: CaptioningConfig, api_key: str) -> ChatServer:
    """Return the server of `[captioning.server]` that answers as `captioning.model`."""
    return ChatServer(config=config.server, table="captioning", model=config.model, api_key=api_key)

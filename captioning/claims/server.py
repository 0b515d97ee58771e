"""Claims asked of a chat server that tells the likeliest first tokens of its answers: vLLM, SGLang, LMDeploy."""

from collections.abc import Iterable, Iterator, Sequence

from PIL import Image

from captioning.claims.asking import Supports, answers_of
from captioning.config import CaptioningConfig
from captioning.engines.openai_engine import chat_server
from encoders.chat import Answer, ChatClient, Decoding, NoAnswer, Question
from encoders.chat_server import ServerError

# As many as vLLM gives unless it is started with more, and as OpenAI gives at all.
NUM_ALTERNATIVES = 20
# One image may be refused for its own sake.
MIN_REFUSED_IMAGES = 3


class ServerAsker:
    """A chat server, asked over HTTP; see `ClaimAsker` for the two methods."""

    def __init__(self, config: CaptioningConfig, *, api_key: str) -> None:
        self._server = chat_server(config, api_key)
        self._client = ChatClient(self._server)
        self._answers = answers_of(config.claims)
        self._has_answered = False

    def prepare(self, image: Image.Image, questions: Sequence[str]) -> list[Question]:
        """Return the questions, each with its image as lossless data URL; called from several threads."""
        first = self._client.question(image, questions[0], seed=0)
        return [first, *(self._client.another(first, question) for question in questions[1:])]

    def supports(self, prepared: Iterable[Sequence[Question]]) -> list[Supports]:
        """Return the supports of each image's claims.

        Raises:
            ServerError: the server cannot be used, or tells no likelihoods.
        """
        counts: list[int] = []

        def questions() -> Iterator[Question]:
            for asked in prepared:
                counts.append(len(asked))
                yield from asked

        decoding = Decoding(max_tokens=1, temperature=0.0, num_alternatives=NUM_ALTERNATIVES)
        answers = self._client.ask_all(questions(), decoding)
        self._require_answers(answers, num_images=len(counts))
        supports = iter([self._support(answer) for answer in answers])
        return [[next(supports) for _ in range(count)] for count in counts]

    def _require_answers(self, answers: Sequence[Answer | NoAnswer], *, num_images: int) -> None:
        """Refuse a server that has never answered: that is no matter of single images, and would leave all unknown."""
        refused = [answer for answer in answers if isinstance(answer, NoAnswer)]
        self._has_answered = self._has_answered or len(refused) < len(answers)
        if not self._has_answered and num_images >= MIN_REFUSED_IMAGES:
            raise ServerError(
                f"{self._server.address} has not answered any of the first {len(refused)} questions about claims, with "
                f"{NUM_ALTERNATIVES} likeliest tokens each (vLLM: --max-logprobs {NUM_ALTERNATIVES}): "
                f"{refused[-1].detail}"
            )

    def _support(self, answer: Answer | NoAnswer) -> float | None:
        if isinstance(answer, NoAnswer):
            return None
        if answer.alternatives is None:
            raise ServerError(
                f"{self._server.address} answers without the likelihoods of its tokens (logprobs and top_logprobs of "
                "the chat interface): take a server that gives them, such as vLLM or SGLang, or let "
                'captioning.claims.engine = "transformers" or "generate" ask the model in this process'
            )
        return self._answers.support_of(answer.alternatives)

"""Claims asked of a model of vLLM in this job: the likeliest first tokens of its answers."""

from collections.abc import Iterable, Sequence

from PIL import Image

from captioning.claims.asking import Supports, answers_of
from captioning.config import CaptioningConfig
from captioning.engines.protocol import Refusal, Request
from captioning.engines.vllm_engine import Question, VllmEngine


class VllmAsker:
    """A model of vLLM; see `ClaimAsker` for the two methods."""

    def __init__(self, config: CaptioningConfig) -> None:
        """Load the model; raises as its engine does."""
        # `claims.batch_size` is for an engine that reads one batch after another.
        self._engine = VllmEngine(config.model_copy(update={"batch_size": 0}))
        self._answers = answers_of(config.claims)

    def prepare(self, image: Image.Image, questions: Sequence[str]) -> list[Question]:
        """Return the questions as the engine takes them."""
        return self._engine.prepare([Request(image=image, prompt=question, seed=0) for question in questions])

    def supports(self, prepared: Iterable[Sequence[Question]]) -> list[Supports]:
        """Return the supports of each image's claims; None of those that do not fit the model's context."""
        asked = list(prepared)
        found = iter(self._engine.first_tokens(question for questions in asked for question in questions))
        return [[self._support(next(found)) for _ in questions] for questions in asked]

    def _support(self, tokens: Sequence[tuple[str, float]] | Refusal) -> float | None:
        return None if isinstance(tokens, Refusal) else self._answers.support_of(tokens)

"""Claims asked of a vision-language model in this process: one look at each question, and no token is written."""

# R questions about an image, V vocabulary

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captioning.claims.asking import Supports, answers_of
from captioning.config import CaptioningConfig
from captioning.engines.choosing import require_finite
from captioning.engines.generate_engine import GenerateEngine
from captioning.engines.transformers_engine import TransformersEngine
from encoders.answers import Answers
from errors import UserError


class InProcessAsker:
    """A model of transformers; see `ClaimAsker` for the two methods."""

    def __init__(self, config: CaptioningConfig, *, num_threads: int) -> None:
        """Load the model; raises as its engine does, and where the vocabulary has no yes or no."""
        engine = TransformersEngine if config.engine == "transformers" else GenerateEngine
        self._engine: Any = engine(config, num_threads=num_threads)
        self._answers = answers_of(config.claims)
        self._yes, self._no = _answer_tokens(self._engine.tokenizer, self._answers, model=config.model)

    def prepare(self, image: Image.Image, questions: Sequence[str]) -> Any:
        """Return the questions as the engine takes them."""
        return self._engine.prepare_questions(image, questions)

    def supports(self, prepared: Iterable[Any]) -> list[Supports]:
        """Return the supports of each image's claims.

        Raises:
            UserError: the model's logits are not finite.
        """
        return [self._supports(logits) for logits in self._engine.first_logits(prepared)]

    def _supports(self, logits: Tensor) -> Supports:
        # NaN throughout stands for a question that does not fit the model's context.
        is_asked = ~torch.isnan(logits).all(-1)
        require_finite(bool(torch.isfinite(logits[is_asked].amax(-1)).all()), self._engine.model.dtype)
        likely = torch.softmax(logits.double(), -1)  # [R, V]
        sums = torch.stack([likely[:, self._yes].sum(-1), likely[:, self._no].sum(-1)], dim=-1)
        return [self._answers.support(yes=yes, no=no) for yes, no in sums.tolist()]


def _answer_tokens(tokenizer: Any, answers: Answers, *, model: str) -> tuple[Tensor, Tensor]:
    """Return the ids of the tokens that begin a yes, and of those that begin a no.

    Raises:
        UserError: there are none.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    sides = [answers.is_yes(token) for token in tokenizer.batch_decode([[token] for token in ids])]
    found: dict[bool, list[int]] = {True: [], False: []}
    for token, side in zip(ids, sides, strict=True):
        if side is not None:
            found[side].append(token)
    for side, key, words in ((True, "yes", answers.yes), (False, "no", answers.no)):
        if not found[side]:
            raise UserError(
                f"captioning.claims.{key} = {list(words)}: no token of {model!r} begins one of these words and "
                "none of the other answer's: set words whose first letters differ"
            )
    return torch.tensor(found[True]), torch.tensor(found[False])

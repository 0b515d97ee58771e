"""The captioner's second lesson: whether a claim is true of the picture, answered with Yes or No.

An answer goes on with what is at the place that the claim is about ("No, a small red star."): without that, colours
that are somewhere in the picture are all that is learnt. The captions go on beside it, so that they get no worse; the
vision tower stays as it is. All questions about a picture stand in one row behind it, and none sees the others. 25
minutes on one core.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pipelines.engine.progress import get_logger
from toyworld.questions import random_claims
from toyworld.scenes import Scene, random_scene
from toyworld.zoo.captioner import chat_text, held_out_hits, training_batch
from toyworld.zoo.optimizer import Trainer
from toyworld.zoo.saving import save_half
from toyworld.zoo.vision_tower import IMAGE_PIXELS, picture_of, pixel_values

# B pictures, T tokens of a row: those of the picture, then those of each question and its answer

log = get_logger("toyworld.zoo")

SEED = 202
NUM_STEPS = 1500  # what is shipped was taught in parts: docs/LOG.md
BATCH_SIZE = 12
CLAIMS_PER_PICTURE = 8
_CAPTION_BATCH_SIZE = 16
_LEARNING_RATE = 2e-3  # at half of it shapes are not learnt
_THERE_WEIGHT = 0.2  # of each token behind yes or no
_QUESTIONS = (
    'Is the following true of the image? "{}" Answer yes or no.',
    'Is this true of the image: "{}"?',
)
_ANSWERS = {True: "Yes", False: "No"}
_PAD, _EOS, _IMAGE = 0, 2, 4
_NO_LOSS = -100


def teach(folder: Path) -> None:
    """Go on with the captioner in `folder`, which has learnt to write captions, and save it there anew."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    processor = LlavaProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    model.model.vision_tower.requires_grad_(False)
    trainer = Trainer(model, num_steps=NUM_STEPS, learning_rate=_LEARNING_RATE)
    for step in range(NUM_STEPS):
        captions = model(**training_batch(processor, rng, batch_size=_CAPTION_BATCH_SIZE)).loss
        batch = question_batch(processor, rng)
        labels = batch.pop("labels")
        questions = _question_loss(model(**batch).logits, labels)
        trainer.step(captions + questions)
        if (step + 1) % 100 == 0:
            averaged = trainer.averaged.eval()
            hits, right = held_out_hits(averaged, processor), _held_out_right(averaged, processor)
            log.info("llava step %d loss %.4f %.4f hits %.3f right %.3f", step + 1, captions, questions, hits, right)
    save_half(trainer.averaged, folder)


def _question_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of yes and no, and with less weight of what an answer goes on with, by question."""
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")  # [B, T - 1]
    is_first = (labels[:, 1:] != _NO_LOSS) & (labels[:, :-1] == _NO_LOSS)
    return (losses * torch.where(is_first, 1.0, _THERE_WEIGHT)).sum() / is_first.sum()


def question_batch(processor: LlavaProcessor, rng: np.random.Generator) -> dict[str, Tensor]:
    """Pictures with `CLAIMS_PER_PICTURE` questions each; the loss counts the answers and their ends."""
    scenes = [random_scene(rng) for _ in range(BATCH_SIZE)]
    rows = [_row(processor, scene, rng) for scene in scenes]
    length = max(len(row["input_ids"]) for row in rows)
    mask = torch.zeros(BATCH_SIZE, 1, length, length, dtype=torch.bool)  # [B, 1, T, T]
    for place, row in enumerate(rows):
        mask[place, 0] = _visible(_padded(row["segments"], length, fill=-1))
    return {
        "input_ids": torch.stack([_padded(row["input_ids"], length, fill=_PAD) for row in rows]),
        "position_ids": torch.stack([_padded(row["position_ids"], length, fill=0) for row in rows]),
        "attention_mask": mask,
        "labels": torch.stack([_padded(row["labels"], length, fill=_NO_LOSS) for row in rows]),
        "pixel_values": pixel_values([picture_of(scene, rng) for scene in scenes]),
    }


def _row(processor: LlavaProcessor, scene: Scene, rng: np.random.Generator) -> dict[str, Tensor]:
    """Tokens of a picture (segment 0) and its questions (1, 2, ...), with the labels of the answers."""
    question = _QUESTIONS[0 if rng.random() < 0.8 else 1]
    ids: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for number, about in enumerate(random_claims(scene, rng, num=CLAIMS_PER_PICTURE)):
        asked = _chat_tokens(processor, question.format(about.claim))
        prefix = len(asked) - asked[::-1].index(_IMAGE)
        answer = f"{_ANSWERS[about.truth]}, {about.there}." if about.there else _ANSWERS[about.truth]
        said = [*processor.tokenizer(answer, add_special_tokens=False).input_ids, _EOS]
        first = prefix if number else 0  # the picture is written once
        own = asked[first:] + said
        ids += own
        segments += [0 if first + i < prefix else number + 1 for i in range(len(own))]
        positions += range(first, first + len(own))
        labels += [_NO_LOSS] * (len(own) - len(said)) + said
    columns = {"input_ids": ids, "segments": segments, "position_ids": positions, "labels": labels}
    return {name: torch.tensor(values) for name, values in columns.items()}


def _chat_tokens(processor: LlavaProcessor, request: str) -> list[int]:
    text = chat_text(processor, request).replace("<image>", "<image>" * (IMAGE_PIXELS // 8) ** 2)
    return processor.tokenizer(text).input_ids


def _visible(segments: Tensor) -> Tensor:
    """Which token sees which, bool [T, T]: what came before it in its own question, and the picture."""
    is_same = segments[:, None] == segments[None, :]
    is_before = torch.ones(len(segments), len(segments), dtype=torch.bool).tril()
    return (is_same | (segments == 0)[None, :]) & is_before


def _padded(values: Tensor, length: int, *, fill: int) -> Tensor:
    return functional.pad(values, (0, length - len(values)), value=fill)


@torch.no_grad()
def _held_out_right(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> float:
    """Fraction of the claims about some held-out scenes of which the likelier of Yes and No is right."""
    rng = np.random.default_rng(1)
    yes, no = (processor.tokenizer(_ANSWERS[truth], add_special_tokens=False).input_ids[0] for truth in (True, False))
    right: list[Tensor] = []
    for _ in range(3):
        batch = question_batch(processor, rng)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        is_answer = ((labels == yes) | (labels == no)) & functional.pad(labels == _NO_LOSS, (1, 0))[:, :-1]
        right.append(((logits[..., yes] > logits[..., no]) == (labels == yes))[is_answer])
    return torch.cat(right).float().mean().item()

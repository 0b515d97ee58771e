"""Toy pictures with captions in which one sentence is false, and two ways to find it: asking back, and likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor

from captioning.claims.loading import load_asker
from captioning.claims.splitting import split_claims
from captioning.config import DESCRIBE, CaptioningConfig
from pipelines.text.sentences import sentence_spans, split_sentences
from toyworld.questions import is_true
from toyworld.scenes import POSITIONS, Scene, random_scene
from toyworld.spoiling import spoil_caption
from toyworld.wording import PLACES, dense_caption
from toyworld.zoo.captioner import chat_text
from toyworld.zoo.vision_tower import picture_of

# By the captioner that is asked, and by another one.
OWN_PHRASES, OTHER_PHRASES = "own_phrases", "other_phrases"


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A picture, its caption, and the numbers of the sentences that are false, and of those that are true."""

    image: Image.Image
    caption: str
    false: frozenset[int]
    true: frozenset[int]


def plant(count: int, kind: str, *, seed: int) -> list[Planted]:
    """Return captions spoilt in one way of `CAPTION_KINDS`, or by one object more, told in phrases of one writer."""
    rng = np.random.default_rng(seed)
    return [_plant(kind, rng) for _ in range(count)]


def _plant(kind: str, rng: np.random.Generator) -> Planted:
    is_told = kind in (OWN_PHRASES, OTHER_PHRASES)
    scene = random_scene(rng, num_objects=int(rng.integers(1, 3)) if is_told else None)
    image, sound = picture_of(scene, rng), dense_caption(scene, rng)
    if is_told:
        told = _with_one_more(scene, rng)
        caption = dense_caption(told, rng) if kind == OWN_PHRASES else _told_otherwise(told)
        truth = [is_true(scene, sentence) for sentence in split_sentences(caption)]
    else:
        caption = spoil_caption(sound, kind, scene=scene, rng=rng)
        said = set(split_sentences(sound))
        truth = [sentence in said for sentence in split_sentences(caption)]
    false, true = (frozenset(n for n, found in enumerate(truth) if found is wanted) for wanted in (False, True))
    return Planted(image=image, caption=caption, false=false, true=true)


def _told_otherwise(scene: Scene) -> str:
    """The objects of a scene in phrases that the captioner has not learnt."""
    said = [f"There is a {o.colour} {o.shape} {PLACES[o.position][0]}, and it is {o.size}." for o in scene.objects]
    return " ".join(said)


def _with_one_more(scene: Scene, rng: np.random.Generator) -> Scene:
    free = sorted(set(POSITIONS) - {item.position for item in scene.objects})
    added = replace(random_scene(rng, num_objects=1).objects[0], position=str(rng.choice(free)))
    objects = sorted((*scene.objects, added), key=lambda item: POSITIONS.index(item.position))
    return replace(scene, objects=tuple(objects))


def ask_back(config: CaptioningConfig, planted: Sequence[Planted]) -> list[list[float]]:
    """Return the support of each sentence of each caption, the least of its claims."""
    asker = load_asker(config, api_key="", num_threads=1)
    claims = [split_claims(each.caption, split=config.claims.split) for each in planted]
    questions = [[config.claims.question.format(claim=claim.text) for claim in said] for said in claims]
    prepared = [asker.prepare(each.image, asked) for each, asked in zip(planted, questions, strict=True)]
    supports: list[list[float]] = []
    for each, said, found in zip(planted, claims, asker.supports(prepared), strict=True):
        of_sentences = [1.0] * len(split_sentences(each.caption))
        for claim, support in zip(said, found, strict=True):
            of_sentences[claim.sentence] = min(of_sentences[claim.sentence], 0.5 if support is None else support)
        supports.append(of_sentences)
    return supports


@torch.inference_mode()
def likelihoods(folder: str, planted: Sequence[Planted]) -> list[list[float]]:
    """Return the mean log-probability of each sentence's tokens, given the image, the prompt and what comes before."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    return [_likelihoods(model, processor, each) for each in planted]


def _likelihoods(model: Any, processor: Any, each: Planted) -> list[float]:
    prompt = chat_text(processor, DESCRIBE)
    inputs = processor(images=[each.image], text=[prompt], return_tensors="pt")
    said = processor.tokenizer(" " + each.caption, add_special_tokens=False, return_offsets_mapping=True)
    tokens = torch.tensor(said.input_ids)
    ids = torch.cat([inputs["input_ids"][0], tokens])[None]
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[0]
    rows = logits[len(ids[0]) - len(tokens) - 1 : -1]
    likely = -functional.cross_entropy(rows, tokens, reduction="none")
    ends = np.array([end - 1 for _, end in said["offset_mapping"]])
    return [
        float(likely[torch.from_numpy((ends > begin) & (ends <= end))].mean())
        for begin, end in sentence_spans(each.caption)
    ]


def auroc(planted: Sequence[Planted], scores: Sequence[Sequence[float]]) -> float:
    """Return how often a true sentence scores higher than a false one, ties as half."""
    pairs = [
        (score, number in each.false)
        for each, of_sentences in zip(planted, scores, strict=True)
        for number, score in enumerate(of_sentences)
        if number in each.false | each.true
    ]
    true = np.array([score for score, is_false in pairs if not is_false])
    false = np.array([score for score, is_false in pairs if is_false])
    return float(((true[:, None] > false).mean() + (true[:, None] >= false).mean()) / 2)

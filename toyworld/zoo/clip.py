"""The embedded CLIPModel with its tokenizer and image processor; stands where a real run names CLIP ViT-L/14.

Pictures and texts are told to fit or not to fit one pair at a time (as SigLIP is, arXiv 2303.15343), so that a cosine
means the same of every picture. To each picture belong a true text, by several writers, and texts that are nearly true:
other colours, shapes, places, objects that are not there. The vision tower begins as the captioner's, and both
embeddings must tell what is at each anchor (`slots`): ground truth in place of 400 million pairs. It sees broken
pictures, too, and has to say how they are broken. 12 minutes on one core.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from pipelines.engine.progress import get_logger
from toyworld.scenes import Scene, random_scene
from toyworld.spoiling import PICTURE_KINDS, spoil_caption, spoil_picture
from toyworld.wording import PATTERN_PHRASES, PLACES, SHAPE_NOUNS, SIZE_ADJECTIVES, dense_caption, describe
from toyworld.zoo.optimizer import Trainer
from toyworld.zoo.saving import save_half
from toyworld.zoo.slots import SOMEWHERE, PooledReadout, scene_targets, slot_loss
from toyworld.zoo.text_encoder import text_targets
from toyworld.zoo.tokenizer import train_tokenizer
from toyworld.zoo.vision_tower import IMAGE_MEAN, IMAGE_PIXELS, IMAGE_STD, picture_of, pixel_values, vision_config

# B pictures, K texts of each, D width of embeddings

log = get_logger("toyworld.zoo")

SEED = 6
NUM_STEPS = 1400
NUM_SOUND = 48
NUM_BROKEN = 14
NUM_FALSE = 2  # texts of each picture that are not true of it
MAX_TOKENS = 128
WIDTH = 128
_LEARNING_RATE = 2e-3
_LENGTHS = 3  # parts of a batch of texts, by length
_VOCAB_SIZE = 768
_SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>"]
_PAD, _BOS, _EOS = 0, 2, 3
_FIRST_SCALE, _FIRST_BIAS = 10.0, -7.0  # of cosines, before they are learnt
_SLOT_WEIGHT, _BROKEN_WEIGHT = 0.3, 0.3
# Wrong shapes are learnt last.
_FALSE_KINDS = ("wrong_shape", "wrong_colour", "wrong_place", "false_object", "swapped", "refusal", "boilerplate")
_FALSE_PROBABILITIES = (0.34, 0.24, 0.14, 0.14, 0.08, 0.03, 0.03)


def build_tokenizer(rng: np.random.Generator) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose texts begin with <s> and end in </s>, as CLIP's do."""
    backend = train_tokenizer(rng, vocab_size=_VOCAB_SIZE, special_tokens=_SPECIAL_TOKENS, extra_texts=[])
    ends = [("<s>", _BOS), ("</s>", _EOS)]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor() -> CLIPImageProcessor:
    """As the captioner's: the whole picture squashed to 64x64, nothing cropped."""
    size = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    return CLIPImageProcessor(size=size, do_center_crop=False, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD))


def build() -> CLIPModel:
    """The untrained model: the captioner's vision tower, and a text tower of three layers of width 128."""
    text = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": _PAD,
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision_config().to_dict(), projection_dim=WIDTH))


class Lesson(nn.Module):
    """The model, and what its embeddings are asked while it learns; all but the model is thrown away."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.readout = PooledReadout(WIDTH, num_slots=SOMEWHERE + 1)
        self.broken = nn.Linear(WIDTH, len(PICTURE_KINDS) + 1)
        self.scale = nn.Parameter(torch.tensor(_FIRST_SCALE).log())
        self.bias = nn.Parameter(torch.tensor(_FIRST_BIAS))

    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings of unit length [B, D]."""
        found: Any = self.clip.get_image_features(pixel_values=pixels)
        return functional.normalize(found.pooler_output.float(), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """Embeddings of unit length [B, D] of padded tokens."""
        lengths = (tokens != _PAD).sum(dim=1)
        order = lengths.argsort()
        found: list[Any] = []
        for rows in order.chunk(_LENGTHS):  # most texts are half as long as the longest
            part = tokens[rows, : int(lengths[rows].max())]
            found.append(self.clip.get_text_features(input_ids=part, attention_mask=(part != _PAD).long()))
        pooled = torch.cat([each.pooler_output.float() for each in found])[order.argsort()]
        return functional.normalize(pooled, dim=-1)

    def fits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits [B, K] that a text fits its image; images [B, D], texts [B, K, D] or [K, D]."""
        cosines = images @ texts.T if texts.ndim == 2 else torch.einsum("bd,bkd->bk", images, texts)
        return cosines * self.scale.exp() + self.bias


def true_text(scene: Scene, rng: np.random.Generator) -> str:
    """A text that is true of a scene, as one of several writers has it."""
    kind = rng.random()
    if kind < 0.6:
        return dense_caption(scene, rng)
    scene = replace(scene, objects=tuple(scene.objects[i] for i in rng.permutation(len(scene.objects))))
    return describe(scene) if kind < 0.75 else _told_otherwise(scene, rng)


def _told_otherwise(scene: Scene, rng: np.random.Generator) -> str:
    said = []
    for item in scene.objects:
        noun, place, size = (
            str(rng.choice(words))
            for words in (SHAPE_NOUNS[item.shape], PLACES[item.position], SIZE_ADJECTIVES[item.size])
        )
        said.append(
            f"There is a {item.colour} {noun} {place}, and it is {size}."
            if rng.random() < 0.5
            else f"{place[0].upper()}{place[1:]} there is a {size} {item.colour} {noun}."
        )
    if rng.random() < 0.6:
        ground = str(rng.choice(PATTERN_PHRASES[scene.pattern])).format(scene.background)
        said.append(f"The background is {ground}.")
    return " ".join(said)


def texts_of(scene: Scene, rng: np.random.Generator) -> list[str]:
    """A true text of a scene, then `NUM_FALSE` that are not."""
    false = []
    for kind in rng.choice(_FALSE_KINDS, size=NUM_FALSE, p=_FALSE_PROBABILITIES):
        false.append(spoil_caption(true_text(scene, rng), str(kind), scene=scene, rng=rng))
    return [true_text(scene, rng), *false]


def broken_picture(scene: Scene, kind: str, rng: np.random.Generator) -> Image.Image:
    """A picture spoilt in one of `PICTURE_KINDS`; half of them went through JPEG after it."""
    spoilt = Image.fromarray(spoil_picture(np.asarray(picture_of(scene, rng).convert("RGB")), kind, rng=rng))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        spoilt.save(buffer, "JPEG", quality=int(rng.integers(85, 96)), subsampling=0)
        spoilt = Image.open(buffer)
    return spoilt


def train(folder: Path, *, captioner_folder: Path) -> None:
    """Train both towers and save them to `folder`, fp16 on disk."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    tokenizer = build_tokenizer(rng)
    tokenizer.save_pretrained(folder)  # before its first call, whose padding it would remember
    build_image_processor().save_pretrained(folder)
    clip = build()
    captioner = LlavaForConditionalGeneration.from_pretrained(captioner_folder, dtype=torch.float32)
    clip.vision_model.load_state_dict(captioner.model.vision_tower.state_dict())
    clip.set_attn_implementation("eager")  # for so short texts torch's own takes ten times as long backwards
    lesson = Lesson(clip)
    trainer = Trainer(lesson, num_steps=NUM_STEPS, learning_rate=_LEARNING_RATE)
    for step in range(NUM_STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, figures = _loss(lesson, tokenizer, rng)
        trainer.step(loss)
        if (step + 1) % 100 == 0:
            log.info("clip step %d loss %.4f %s", step + 1, loss.item(), figures)
    save_half(trainer.averaged.clip, folder)


def _loss(
    lesson: Lesson, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    scenes = [random_scene(rng) for _ in range(NUM_SOUND)]
    kinds = rng.integers(len(PICTURE_KINDS), size=NUM_BROKEN)
    pictures = [picture_of(scene, rng) for scene in scenes]
    pictures += [broken_picture(random_scene(rng), PICTURE_KINDS[kind], rng) for kind in kinds]
    texts = [text for scene in scenes for text in texts_of(scene, rng)]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
    of_images = lesson.images(pixel_values([picture.convert("RGB") for picture in pictures]))
    of_texts = lesson.texts(tokens).view(NUM_SOUND, NUM_FALSE + 1, WIDTH)  # [B, K, D]
    sound = of_images[:NUM_SOUND]
    fits, own = _fit_loss(lesson, sound, of_texts)
    slots = slot_loss(lesson.readout(sound), scene_targets(scenes, num_slots=SOMEWHERE + 1))
    slots = slots + slot_loss(lesson.readout(of_texts.flatten(0, 1)), text_targets(texts))
    is_broken = torch.cat([torch.zeros(NUM_SOUND, dtype=torch.long), torch.from_numpy(kinds) + 1])
    broken = functional.cross_entropy(lesson.broken(of_images * WIDTH**0.5), is_broken)
    figures = {
        "fits": fits.item(),
        "right": (own > 0).eq(torch.arange(NUM_FALSE + 1) == 0).float().mean().item(),
        "slots": slots.item(),
        "broken": broken.item(),
    }
    return fits + _SLOT_WEIGHT * slots + _BROKEN_WEIGHT * broken, {k: round(v, 4) for k, v in figures.items()}


def _fit_loss(lesson: Lesson, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each picture's own texts and of those of the others, and the logits [B, K] of its own."""
    own = lesson.fits(images, texts)
    is_true = torch.zeros_like(own)
    is_true[:, 0] = 1
    others = lesson.fits(images, texts[:, 0])[~torch.eye(len(images), dtype=torch.bool)]
    of_own = functional.binary_cross_entropy_with_logits(own, is_true, pos_weight=torch.tensor(float(NUM_FALSE)))
    return of_own + functional.binary_cross_entropy_with_logits(others, torch.zeros_like(others)), own

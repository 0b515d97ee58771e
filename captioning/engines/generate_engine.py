"""The in-process engine for any vision-language model of transformers: its own `generate`, on batches of one length.

Every image is preprocessed by itself, ahead of the device, and batches are put together from what comes out. How a
model's makers batch their inputs is known from their processor, and asked once: where the two differ, images go one by
one. A batch lasts until its longest caption ends, so LLaVA is faster in `transformers_engine`.
"""

# L prompt tokens with those of the image

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, LogitsProcessorList
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from captioning.architectures import read_architecture
from captioning.config import CaptioningConfig
from captioning.engines.choosing import RowChoice, draw_uniforms
from captioning.engines.inputs import put_together
from captioning.engines.processors import SERVER, ProcessorCopies, load_processor
from captioning.engines.protocol import PROBE_TOKENS, Caption, Request
from captioning.engines.tokens import end_token_ids, has_begin_token, read_caption, special_tokens
from encoders.batches import Batches
from encoders.devices import choose_device, choose_dtype
from encoders.weights import ModelSource, load_pretrained, resolve_model
from errors import UserError
from pipelines.engine.progress import get_logger

log = get_logger("captioning")

# Where the recipe leaves it open: what a batch takes is known only when it runs, and one too large is halved.
DEFAULT_ROWS = 32
# Prompts of so many batches are looked at to find those of one length.
SORTED_BATCHES = 4
# What is kept of a model's own settings for `generate`: how captions begin and end, not how they are chosen.
TOKENS_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")
# Two images and prompts that differ in everything that may need padding.
SAMPLES = ((Image.new("RGB", (96, 64), "red"), "Hi"), (Image.new("RGB", (64, 200), "blue"), "Describe this image."))


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """The processor's outputs for one image and its prompt, on the CPU; `num_tokens` counts the image's tokens too."""

    inputs: dict[str, Any]
    seed: int

    @property
    def num_tokens(self) -> int:
        """L, by which batches are sorted."""
        return self.inputs["input_ids"].shape[1]


class GenerateEngine:
    """A vision-language model loaded in this process; see `CaptionEngine` for the three methods.

    Attributes:
        model, processor, tokenizer: those of transformers.
        batch_rows: captions decoded at a time, at most; 1 where inputs of several images cannot be put together.
    """

    def __init__(self, config: CaptioningConfig, *, num_threads: int) -> None:
        """Load the model and its processor.

        Raises:
            UserError: the model is not there, lacks weights, sees no images, has no chat template or answers behind
                an encoder; names `captioning.model`.
        """
        torch.set_num_threads(num_threads)
        device = choose_device(config.device, key="captioning.device")
        dtype = choose_dtype(config.dtype, device)
        self.is_exact = dtype == torch.float32
        self._config, self._named = config, f"captioning.model {config.model!r}"
        source = resolve_model(config.model, config.revision)
        _require_vision(source, self._named)
        settings = {"dtype": dtype}
        self.model = load_pretrained(AutoModelForImageTextToText, source, settings=settings, key="captioning.model")
        self.model.to(device)
        _require_decoder(self.model, self._named)
        self.processor = load_processor(source, config=self.model.config, named=self._named)
        self.tokenizer = self.processor.tokenizer
        self._template = self.processor.chat_template or self.tokenizer.chat_template
        if self._template is None:
            raise UserError(
                f"{self._named} has no chat template, and captioning.engine = 'generate' asks in no other way: take a "
                f"model that was tuned to answer, or write its chat_template.jinja; {SERVER}"
            )
        self._end_token_ids = _settle_tokens(self.model, self.tokenizer)
        self._special_tokens = special_tokens(self.tokenizer, self.processor)
        self._context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._processors = ProcessorCopies(self.processor)
        self._wrap(self.processor, SAMPLES[0][1])
        self.batch_rows = (config.batch_size or DEFAULT_ROWS) if self._can_put_together() else 1
        self._batches = Batches(self.batch_rows)

    def prepare(self, requests: Sequence[Request]) -> list[PreparedImage | None]:
        """Return each request as the model's inputs, or None; see `CaptionEngine`."""
        with self._processors.take() as processor:
            return [self._prepare(processor, request) for request in requests]

    def _prepare(self, processor: Any, request: Request) -> PreparedImage | None:
        inputs = self._process(processor, [request.image], [request.prompt])
        pixels = [value for value in inputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
        assert all(value.numel() > 0 and bool(torch.isfinite(value).all()) for value in pixels), "finite pixels"
        prepared = PreparedImage(inputs=inputs, seed=request.seed)
        if self._context is not None and prepared.num_tokens + self._config.max_new_tokens > self._context:
            return None
        return prepared

    def caption(self, prepared: Iterable[PreparedImage], *, repetition_penalty: float = 1.0) -> list[Caption]:
        """Return one caption per prompt, in order; prompts of about one length are decoded together."""
        waiting: list[tuple[int, PreparedImage]] = []
        captions: dict[int, Caption] = {}
        source = enumerate(prepared)

        def generate(batch: Sequence[tuple[int, PreparedImage]]) -> list[Caption]:
            return self._generate(
                [image for _, image in batch],
                max_new_tokens=self._config.max_new_tokens,
                temperature=self._config.temperature,
                repetition_penalty=repetition_penalty,
            )

        while True:
            waiting += islice(source, SORTED_BATCHES * self.batch_rows - len(waiting))
            if not waiting:
                return [captions[index] for index in range(len(captions))]
            # Longest first: what does not fit the memory shows early.
            waiting.sort(key=lambda item: (-item[1].num_tokens, item[0]))
            batch, waiting = waiting[: self._batches.size], waiting[self._batches.size :]
            captions |= zip((index for index, _ in batch), self._batches.run(batch, generate), strict=True)

    def prepare_questions(self, image: Image.Image, questions: Sequence[str]) -> list[PreparedImage | None]:
        """Return questions about an image as the model's inputs; None is too long. Called from several threads."""
        prepared = self.prepare([Request(image=image, prompt=question, seed=0) for question in questions])
        first = next((question.inputs for question in prepared if question is not None), {})
        for question in prepared:
            if question is not None:
                # The image's own inputs are alike for all of them, and held once.
                question.inputs.update(
                    {name: first[name] for name, value in question.inputs.items() if _equal(value, first[name])}
                )
        return prepared

    def first_logits(self, prepared: Iterable[Sequence[PreparedImage | None]]) -> Iterator[Tensor]:
        """Yield, for each image, the logits [questions, V] of the answers' first tokens; NaN of those too long."""
        images = iter(prepared)
        while window := _take_questions(images, num=self.batch_rows):
            asked = [question for questions in window for question in questions if question is not None]
            rows = iter(list(self._batches.run(asked, self._first_logits)))
            for questions in window:
                yield torch.stack([self._unknown if question is None else next(rows) for question in questions])

    @property
    def _unknown(self) -> Tensor:
        return torch.full((self.model.get_output_embeddings().weight.shape[0],), torch.nan)

    @torch.inference_mode()
    def _first_logits(self, batch: Sequence[PreparedImage]) -> list[Tensor]:
        inputs = put_together([question.inputs for question in batch], pad_token_id=self.tokenizer.pad_token_id)
        inputs = {name: self._to_device(value) for name, value in inputs.items()}
        settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        # `generate` knows the positions of padded prompts, whatever the model.
        return list(self.model.generate(**inputs, **settings).logits[0].float().cpu())

    def probe(self, prepared: Iterable[PreparedImage]) -> list[Caption]:
        """Return greedy captions of at most `PROBE_TOKENS` tokens, in batches like those of `caption`."""

        def generate(batch: Sequence[PreparedImage]) -> list[Caption]:
            most = min(PROBE_TOKENS, self._config.max_new_tokens)
            return self._generate(batch, max_new_tokens=most, temperature=0.0, repetition_penalty=1.0)

        return list(self._batches.run(list(prepared), generate))

    @torch.inference_mode()
    def _generate(
        self, batch: Sequence[PreparedImage], *, max_new_tokens: int, temperature: float, repetition_penalty: float
    ) -> list[Caption]:
        inputs = put_together([image.inputs for image in batch], pad_token_id=self.tokenizer.pad_token_id)
        inputs = {name: self._to_device(value) for name, value in inputs.items()}
        uniforms = [draw_uniforms(image.seed, max_new_tokens) for image in batch] if temperature else []
        choice = RowChoice(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            uniforms=torch.stack(uniforms).to(self.model.device) if uniforms else None,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            dtype=self.model.dtype,
        )
        output = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=LogitsProcessorList([choice])
        )
        num_prompt = inputs["input_ids"].shape[1]
        assert torch.equal(output[:, :num_prompt], inputs["input_ids"]), "the prompt comes before the caption"
        return [self._caption(tokens) for tokens in output[:, num_prompt:].tolist()]

    def _caption(self, tokens: Sequence[int]) -> Caption:
        ends = [index for index, token in enumerate(tokens) if token in self._end_token_ids]
        kept = tokens[: ends[0]] if ends else tokens
        return read_caption(self.tokenizer, kept, "stop" if ends else "length")

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else value.dtype)

    def _process(self, processor: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
        texts = [self._wrap(processor, prompt) for prompt in prompts]
        return dict(
            processor(
                images=[[image] for image in images],
                text=texts,
                add_special_tokens=not has_begin_token(self.tokenizer, texts[0]),
                padding=len(texts) > 1,
                return_tensors="pt",
            )
        )

    def _wrap(self, processor: Any, prompt: str) -> str:
        # An alt text may hold anything, tokens of images and of ends too.
        prompt = self._special_tokens.sub(" ", prompt)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        try:
            text = processor.apply_chat_template(messages, chat_template=self._template, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"the chat template of {self._named} takes no images: {error}; {SERVER}") from error
        if prompt.strip() not in text:
            raise UserError(f"the chat template of {self._named} leaves out what is asked about an image; {SERVER}")
        return text

    def _can_put_together(self) -> bool:
        """Whether inputs of single images make the batch that the model's own processor makes of them."""
        images, prompts = [image for image, _ in SAMPLES], [prompt for _, prompt in SAMPLES]
        try:
            alone = [self._process(self.processor, [image], [prompt]) for image, prompt in SAMPLES]
        except ValueError as error:
            raise UserError(
                f"the {type(self.processor).__name__} of {self._named} does not take what its chat template makes of "
                f"an image and a prompt: {str(error).splitlines()[0]}; {SERVER}"
            ) from error
        try:
            expected = self._process(self.processor, images, prompts)
            ours = put_together(alone, pad_token_id=self.tokenizer.pad_token_id)
        except (ValueError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
        else:
            differing = sorted(name for name in {*ours, *expected} if not _equal(ours.get(name), expected.get(name)))
            reason = f"{', '.join(differing)} of a batch"
            if not differing:
                return True
        log.warning(
            f"{self._named}: a {type(self.processor).__name__} batches its inputs in a way of its own ({reason}): "
            "captioning.batch_size is 1 for it"
        )
        return False


def _take_questions(
    images: Iterator[Sequence[PreparedImage | None]], *, num: int
) -> list[Sequence[PreparedImage | None]]:
    """Return the questions about the next images, of as many images as have `num` of them."""
    taken: list[Sequence[PreparedImage | None]] = []
    while sum(map(len, taken)) < num and (questions := next(images, None)) is not None:
        taken.append(questions)
    return taken


def _equal(ours: Any, expected: Any) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(expected, Tensor):
        return False
    return ours.dtype == expected.dtype and torch.equal(ours, expected)


def _require_vision(source: ModelSource, named: str) -> None:
    """Refuse what transformers does not know as a model of images and text.

    Raises:
        UserError: names what the model is.
    """
    architecture = read_architecture(source)
    if architecture is None or architecture.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    raise UserError(
        f"{named} is a {architecture.name} ({architecture.model_type}), which transformers does not know as a "
        "vision-language model: captions need one that sees images, in transformers' own form (of some, repositories "
        f"whose names end in -hf); {SERVER}"
    )


def _require_decoder(model: Any, named: str) -> None:
    """Refuse a model whose answers do not go on where the prompt ends.

    Raises:
        UserError: an encoder reads the prompt; names the class.
    """
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True).is_encoder_decoder:
        raise UserError(
            f"{named} is a {type(model).__name__}, whose encoder reads the prompt: captioning.engine = 'generate' is "
            f"for models that go on where the prompt ends; {SERVER}"
        )


def _settle_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Leave of a model's own settings for `generate` its special tokens, see to the padding; returns the end tokens.

    Published models come with settings for chatting (temperature, penalties, beams), which `generate` would take up.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = model.generation_config
    kept = {name: getattr(found, name, None) for name in TOKENS_KEPT}
    ends = end_token_ids(found, tokenizer)
    kept |= {"eos_token_id": sorted(ends), "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**kept)
    return ends

"""The in-process engine: LLaVA-1.5 and LLaVA-NeXT of transformers, with continuous batching."""

# N image tokens, L prompt tokens

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from captioning.config import CaptioningConfig
from captioning.engines.decoding import ContinuousDecoder
from captioning.engines.llama import LlamaForward
from captioning.engines.processors import ProcessorCopies, load_processor
from captioning.engines.protocol import PROBE_TOKENS, Caption, Request
from captioning.engines.room import count_slots
from captioning.engines.rows import DecodingSettings, TokenizedPrompt
from captioning.engines.tokens import end_token_ids, has_begin_token, read_caption, special_tokens
from captioning.prompts import fill_prompt
from encoders.devices import choose_device, choose_dtype
from encoders.weights import load_pretrained, resolve_model
from pipelines.engine.progress import get_logger

log = get_logger("captioning")

IMAGE_INPUTS = ("pixel_values", "image_sizes")
# Cut into as many tiles as a LLaVA-NeXT cuts a large square.
LARGE_IMAGE = (1344, 1344)
# LLaVA-1.5's own, for processors that come without a chat template.
PLAIN_TEMPLATE = "USER: {image_token}\n{prompt} ASSISTANT:"


@dataclass(frozen=True, kw_only=True)
class TokenizedQuestions:
    """Questions about one image: ids [L] of all that they share, and of what each goes on with; None is too long."""

    shared: Tensor
    own: list[Tensor | None]
    image_inputs: dict[str, Tensor]


class TransformersEngine:
    """A LLaVA loaded in this process; see `CaptionEngine` for the three methods.

    Attributes:
        model, processor, tokenizer: those of transformers, the processor corrected from the model's config.
    """

    def __init__(self, config: CaptioningConfig, *, num_threads: int, gpu_share: float = 1.0) -> None:
        """Load the model and correct its processor; `gpu_share` of the GPU's memory is for it, 0 if nobody knows.

        Raises:
            UserError: the model is not there, or lacks weights; names `captioning.model`.
        """
        torch.set_num_threads(num_threads)
        device = choose_device(config.device, key="captioning.device")
        dtype = choose_dtype(config.dtype, device)
        self.is_exact = dtype == torch.float32
        self.model = _load_model(config, dtype).to(device)
        self.processor = _load_processor(config, self.model)
        self.tokenizer = self.processor.tokenizer
        self._special_tokens = special_tokens(self.tokenizer, self.processor)
        self._processors = ProcessorCopies(self.processor)
        self._context = self.model.config.get_text_config().max_position_embeddings
        self._max_new_tokens = config.max_new_tokens
        self._forward = LlamaForward(self.model)
        settings = DecodingSettings(
            num_slots=config.batch_size or self._count_slots(config, gpu_share=gpu_share),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            end_token_ids=end_token_ids(self.model.generation_config, self.tokenizer),
        )
        self._decoder = ContinuousDecoder(self._forward, settings)
        self._probe_settings = dataclasses.replace(
            settings, temperature=0.0, max_new_tokens=min(PROBE_TOKENS, config.max_new_tokens)
        )

    def _count_slots(self, config: CaptioningConfig, *, gpu_share: float) -> int:
        """Return the captions decoded at a time where the recipe leaves it open: see `count_slots`."""
        alt_text = ("a " * config.max_alt_text_chars)[: config.max_alt_text_chars]
        default = config.prompts["default"]
        prompts = [
            fill_prompt(template, alt_text, default=default, max_alt_text_chars=config.max_alt_text_chars)
            for template in config.prompts.values()
        ]
        [longest] = self.prepare([Request(image=Image.new("RGB", LARGE_IMAGE), prompt=max(prompts, key=len), seed=0)])
        num_tokens = self._context - self._max_new_tokens if longest is None else len(longest.input_ids)
        num_slots = count_slots(
            self.model, gpu_share=gpu_share, num_prompt_tokens=num_tokens, max_new_tokens=self._max_new_tokens
        )
        if self.model.device.type != "cpu":
            share = f"{gpu_share:.0%} of the GPU" if gpu_share else "a GPU that other workers may use"
            log.info(f"captioning.batch_size 0: {num_slots} captions at a time on {share}")
        return num_slots

    def prepare(self, requests: Sequence[Request]) -> list[TokenizedPrompt | None]:
        """Return each request as token ids and pixels on the CPU, or None; see `CaptionEngine`."""
        if not requests:
            return []
        texts = [self._wrap(request.prompt) for request in requests]
        adds_begin = not has_begin_token(self.tokenizer, texts[0])
        with self._processors.take() as processor:
            inputs = processor(
                images=[request.image for request in requests], text=texts, add_special_tokens=adds_begin
            )
        return [self._make_prompt(inputs, row, seed=request.seed) for row, request in enumerate(requests)]

    def _make_prompt(self, inputs: Any, row: int, *, seed: int) -> TokenizedPrompt | None:
        input_ids = torch.tensor(inputs["input_ids"][row])  # [L]
        image_inputs = _image_inputs(inputs, row)
        if len(input_ids) + self._max_new_tokens > self._context:
            return None
        return TokenizedPrompt(input_ids=input_ids, image_inputs=image_inputs, seed=seed)

    def caption(self, prepared: Iterable[TokenizedPrompt], *, repetition_penalty: float = 1.0) -> list[Caption]:
        """Return one caption per prompt, in order."""
        return self._continue(self._decoder, prepared, repetition_penalty=repetition_penalty)

    def prepare_questions(self, image: Image.Image, questions: Sequence[str]) -> TokenizedQuestions:
        """Return questions about an image on the CPU; called from several threads."""
        texts = [self._wrap(question) for question in questions]
        adds_begin = not has_begin_token(self.tokenizer, texts[0])
        with self._processors.take() as processor:
            inputs = processor(images=[image], text=texts[:1], add_special_tokens=adds_begin)
            num_tokens = inputs["input_ids"][0].count(self.model.config.image_token_id)
            token = processor.image_token
            # The image is processed once: its tokens stand in all of them.
            expanded = [text.replace(token, token * num_tokens) for text in texts]
            ids = processor.tokenizer(expanded, add_special_tokens=adds_begin)["input_ids"]
        assert ids[0] == inputs["input_ids"][0], "the tokens that the processor makes"
        end = len(ids[0]) - ids[0][::-1].index(self.model.config.image_token_id)
        assert all(row[:end] == ids[0][:end] for row in ids), "questions begin with the image"
        return TokenizedQuestions(
            shared=torch.tensor(ids[0][:end]),
            own=[torch.tensor(row[end:]) if len(row) < self._context else None for row in ids],
            image_inputs=_image_inputs(inputs, 0),
        )

    @torch.inference_mode()
    def first_logits(self, prepared: Iterable[TokenizedQuestions]) -> Iterator[Tensor]:
        """Yield, for each image, the logits [questions, V] of the answers' first tokens; NaN of those too long."""
        for asked in prepared:
            fitting = [row for row, own in enumerate(asked.own) if own is not None]
            logits = torch.full((len(asked.own), self._forward.vocabulary), torch.nan)
            if fitting:
                questions = [own for own in asked.own if own is not None]
                found = self._forward.ask(asked.shared, questions, asked.image_inputs)
                logits[fitting] = found.float().cpu()
            yield logits

    def probe(self, prepared: Iterable[TokenizedPrompt]) -> list[Caption]:
        """Return greedy captions of at most `PROBE_TOKENS` tokens, decoded as one batch."""
        batch = list(prepared)
        decoder = ContinuousDecoder(self._forward, dataclasses.replace(self._probe_settings, num_slots=len(batch)))
        return self._continue(decoder, batch, repetition_penalty=1.0)

    def _continue(
        self, decoder: ContinuousDecoder, prepared: Iterable[TokenizedPrompt], *, repetition_penalty: float
    ) -> list[Caption]:
        continuations = decoder.decode(prepared, repetition_penalty=repetition_penalty)
        return [read_caption(self.tokenizer, found.token_ids, found.finish_reason) for found in continuations]

    def _wrap(self, prompt: str) -> str:
        image_token = self.processor.image_token
        # An alt text may hold anything, `<image>` and `</s>` too.
        prompt = self._special_tokens.sub(" ", prompt)
        if self.processor.chat_template is None:
            text = PLAIN_TEMPLATE.format(image_token=image_token, prompt=prompt)
        else:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            messages = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text.count(image_token) == 1, f"one image per prompt, not {text.count(image_token)}: {text!r}"
        return text


def _image_inputs(inputs: Any, row: int) -> dict[str, Tensor]:
    """Return what a processor has made of one of its images."""
    found = {name: torch.as_tensor(np.asarray(inputs[name][row]))[None] for name in IMAGE_INPUTS if name in inputs}
    pixels = found["pixel_values"]
    assert pixels.numel() > 0 and bool(torch.isfinite(pixels).all()), "an image has finite pixels"
    return found


def _load_model(config: CaptioningConfig, dtype: torch.dtype) -> Any:
    source = resolve_model(config.model, config.revision)
    settings = {"dtype": dtype, "attn_implementation": "sdpa"}
    return load_pretrained(AutoModelForImageTextToText, source, settings=settings, key="captioning.model")


def _load_processor(config: CaptioningConfig, model: Any) -> Any:
    """Load the processor and make it agree with the model, whose config knows what its hub files may have wrong."""
    source = resolve_model(config.model, config.revision)
    processor = load_processor(source, config=model.config, named=f"captioning.model {config.model!r}")
    processor.tokenizer.padding_side = "left"
    processor.patch_size = model.config.vision_config.patch_size
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    tower = model.model.vision_tower
    has_class_token = any(name.endswith("class_embedding") for name, _ in tower.named_parameters())
    processor.num_additional_image_tokens = int(has_class_token)
    assert processor.tokenizer.padding_side == "left"
    return processor

"""The in-process engine for clusters with vLLM: each worker of the job holds a model, and there is no server to keep.

It is vLLM's own offline class `LLM` behind the protocol of all engines, in the workers that caption with any of them.
Ray's `ray.data.llm` runs the same vLLM as stages of a dataset. That yields rows in the order in which they end, writes
blocks of rows and no shards, asks a second time only in another pass over all, and resumes by the ids of rows that were
written, which every reader holds in memory. Here a slice is asked as a whole, so that shards, parts, second tries,
rejects and resume are those of the other engines. Written after vLLM 0.29.
"""

import dataclasses
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from captioning.config import CaptioningConfig
from captioning.engines.protocol import PROBE_TOKENS, Caption, FinishReason, Refusal, Request
from captioning.engines.tokens import special_tokens
from encoders.weights import ModelSource, resolve_model
from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.raw.images import shrink

REFUSED = "refused_by_engine"
FINISHED: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
# Images that wait in memory to be asked about: a call ends with its longest caption, so many are asked together.
MAX_TOGETHER = 1024
MAX_PIXELS_TOGETHER = 2**29
# As many as vLLM tells, unless it is loaded with more.
NUM_ALTERNATIVES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """An image, what is asked about it, and the seed of its caption."""

    image: Image.Image
    prompt: str
    seed: int


class VllmEngine:
    """A model of vLLM, loaded in this process or those that vLLM starts; see `CaptionEngine` for the three methods."""

    # What is computed together depends on what came in, and sums are rounded otherwise.
    is_exact = False

    def __init__(self, config: CaptioningConfig) -> None:
        """Load the model.

        Raises:
            UserError: the model is not there, or vLLM does not take it or an argument; names the recipe's key.
        """
        # Of no environment but its own, so that nothing here is checked against it.
        self._vllm: Any = importlib.import_module("vllm")
        self._config = config
        source = resolve_model(config.model, config.revision)
        _require_known_arguments(config, self._vllm)
        refusals = importlib.import_module("vllm.exceptions").VLLMClientError
        self._refusals: tuple[type[Exception], ...] = (ValueError, refusals)
        try:
            self._llm = self._vllm.LLM(**engine_arguments(config, source))
        except (ValueError, TypeError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"captioning.model {config.model!r} cannot be loaded by vLLM {self._vllm.__version__}, with "
                f"captioning.vllm as it is: {first}"
            ) from error
        tokenizer = self._llm.get_tokenizer()
        # Mistral's own tokenizers take no special token for one that stands in a text.
        is_known = hasattr(tokenizer, "added_tokens_decoder")
        self._special_tokens = special_tokens(tokenizer, None) if is_known else re.compile("(?!)")

    def prepare(self, requests: Sequence[Request]) -> list[Question]:
        """Return each request, its image as small as it is given; called from several threads."""
        pixels = self._config.vllm.image_short_side_pixels
        return [
            Question(
                image=shrink(request.image, short_side_pixels=pixels),
                # An alt text may hold anything, tokens of images and of ends too.
                prompt=self._special_tokens.sub(" ", request.prompt),
                seed=request.seed,
            )
            for request in requests
        ]

    def caption(self, prepared: Iterable[Question], *, repetition_penalty: float = 1.0) -> list[Caption | Refusal]:
        """Return one caption or refusal per prompt, in order."""
        settings = {
            "max_tokens": self._config.max_new_tokens,
            "temperature": self._config.temperature,
            "repetition_penalty": repetition_penalty,
        }
        return [_read(answer) for answer in self._ask_all(prepared, settings)]

    def probe(self, prepared: Iterable[Question]) -> list[Caption | Refusal]:
        """Return greedy captions of at most `PROBE_TOKENS` tokens."""
        settings = {"max_tokens": min(PROBE_TOKENS, self._config.max_new_tokens), "temperature": 0.0}
        return [_read(answer) for answer in self._ask_all(prepared, settings)]

    def first_tokens(self, prepared: Iterable[Question]) -> list[list[tuple[str, float]] | Refusal]:
        """Return, for each prompt, the likeliest first tokens of an answer with their log-probabilities."""
        settings = {"max_tokens": 1, "temperature": 0.0, "logprobs": NUM_ALTERNATIVES}
        return [
            answer
            if isinstance(answer, Refusal)
            else [(found.decoded_token or "", found.logprob) for found in answer.logprobs[0].values()]
            for answer in self._ask_all(prepared, settings)
        ]

    def _ask_all(self, prepared: Iterable[Question], settings: dict[str, Any]) -> Iterator[Any]:
        for questions in _together(prepared):
            yield from self._ask(questions, settings)

    def _ask(self, questions: Sequence[Question], settings: dict[str, Any]) -> list[Any]:
        """Return vLLM's output of each question, or why there is none: it refuses all of a call for the sake of one."""
        # Seeds are those of sampling, and a greedy row that has one is slower.
        seeds = [{"seed": question.seed} if settings["temperature"] else {} for question in questions]
        try:
            outputs = self._llm.chat(
                [_conversation(question) for question in questions],
                sampling_params=[self._vllm.SamplingParams(**settings, **seed) for seed in seeds],
                use_tqdm=False,
            )
        except self._refusals as error:
            if len(questions) == 1:
                return [Refusal(reason=REFUSED, detail=str(error))]
            middle = len(questions) // 2
            return self._ask(questions[:middle], settings) + self._ask(questions[middle:], settings)
        assert len(outputs) == len(questions), "one output per question"
        return [output.outputs[0] for output in outputs]


def engine_arguments(config: CaptioningConfig, source: ModelSource) -> dict[str, Any]:
    """Return what vLLM's `LLM` is loaded with, by its own names."""
    vllm, dtype = config.vllm, config.dtype
    if dtype == "auto":
        dtype = "float32" if config.device == "cpu" else "bfloat16"
    arguments: dict[str, Any] = {
        "model": source.location,
        "revision": source.revision,
        "tokenizer_revision": source.revision,
        "dtype": dtype,
        "seed": 0,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
        "trust_remote_code": vllm.trust_remote_code,
        "limit_mm_per_prompt": {"image": 1},
        # Settings for chatting in a model's files do not count, as with the other engines.
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **vllm.engine_args,
    }
    if vllm.max_model_len:
        arguments["max_model_len"] = vllm.max_model_len
    if config.batch_size:
        arguments["max_num_seqs"] = config.batch_size
    if vllm.tensor_parallel_size > 1:
        # The worker has these GPUs: left to itself vLLM would ask Ray for as many more, and wait for ever.
        arguments["distributed_executor_backend"] = "mp"
    return arguments


def _require_known_arguments(config: CaptioningConfig, vllm: Any) -> None:
    known = [field.name for field in dataclasses.fields(vllm.EngineArgs)]
    for name in config.vllm.engine_args:
        if name not in known:
            raise UserError(
                f"captioning.vllm.engine_args has {name!r}, which vLLM {vllm.__version__} has no argument for"
                f"{did_you_mean(name, known)}"
            )


def _together(prepared: Iterable[Question]) -> Iterator[list[Question]]:
    """Yield the questions that are asked in one call: as many as there are, but for memory."""
    questions: list[Question] = []
    num_pixels = 0
    for question in prepared:
        questions.append(question)
        num_pixels += question.image.width * question.image.height
        if len(questions) == MAX_TOGETHER or num_pixels >= MAX_PIXELS_TOGETHER:
            yield questions
            questions, num_pixels = [], 0
    if questions:
        yield questions


def _conversation(question: Question) -> list[dict[str, Any]]:
    content = [{"type": "image_pil", "image_pil": question.image}, {"type": "text", "text": question.prompt}]
    return [{"role": "user", "content": content}]


def _read(answer: Any) -> Caption | Refusal:
    if isinstance(answer, Refusal):
        return answer
    finish_reason = FINISHED.get(answer.finish_reason)
    if finish_reason is None:
        return Refusal(reason=REFUSED, detail=f"vLLM ended it with {answer.finish_reason!r}")
    # The token that ends a caption is the last of those that are told, and is none of the caption's.
    num_tokens = len(answer.token_ids) - (finish_reason == "stop")
    return Caption(text=answer.text.strip(), num_tokens=num_tokens, finish_reason=finish_reason)

"""A module called vllm: what `captioning` touches of vLLM 0.29, by its names and signatures, without a model.

Captions are made of what is asked, the image and the seed, so that what reaches the model shows.
"""

import dataclasses
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image


class VLLMError(Exception):
    """As in vllm.exceptions: no ValueError."""


class VLLMClientError(VLLMError):
    """A request that cannot be served."""


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    """Those of vLLM's that captions could use; another name is a TypeError, as there."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    repetition_penalty: float = 1.0
    logprobs: int | None = None


@dataclasses.dataclass(kw_only=True)
class EngineArgs:
    """A few of vLLM's, all those that `captioning` passes among them."""

    model: str
    revision: str | None = None
    tokenizer_revision: str | None = None
    dtype: str = "auto"
    seed: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.92
    trust_remote_code: bool = False
    limit_mm_per_prompt: dict[str, int] = dataclasses.field(default_factory=dict)
    generation_config: str = "auto"
    disable_log_stats: bool = False
    use_tqdm_on_load: bool = True
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    distributed_executor_backend: str | None = None
    quantization: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    enforce_eager: bool = False


@dataclasses.dataclass
class Logprob:
    """As vllm.logprobs has it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class Tokenizer:
    """What of a tokenizer of transformers tells special tokens."""

    def __init__(self) -> None:
        self.added_tokens_decoder = {7: SimpleNamespace(content="<|im_end|>", special=True)}
        self.all_special_tokens = ("<image>", "</s>")


class LLM:
    """vLLM's class, which notes what it is loaded with and asked: `loaded` and `calls` of the module."""

    def __init__(self, model: str, **arguments: Any) -> None:
        module = sys.modules["vllm"]
        self._args = EngineArgs(model=model, **arguments)
        if self._args.quantization == "none such":
            raise ValueError("Unknown quantization method: none such.\nMust be one of [...]")
        module.loaded.append(self._args)
        self._module = module

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def chat(
        self,
        messages: Sequence[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[Any]:
        """Return an output per conversation, in order; of a call with one that is refused there is none."""
        assert isinstance(sampling_params, list) and len(sampling_params) == len(messages) and not use_tqdm
        asked = [_asked(message) for message in messages]
        self._module.calls.append((asked, sampling_params))
        for image, prompt in asked:
            if "refuse" in prompt:
                raise VLLMClientError(
                    "The decoder prompt (length 9000) is longer than the maximum model length of 4096"
                )
            if image.width == 31:
                raise ValueError("height and width must be > 32")
        pairs = zip(asked, sampling_params, strict=True)
        return [
            SimpleNamespace(outputs=[self._module.answer(image, prompt, params)]) for (image, prompt), params in pairs
        ]


def _asked(conversation: Sequence[dict[str, Any]]) -> tuple[Image.Image, str]:
    [message] = conversation
    assert message["role"] == "user"
    picture, text = message["content"]
    assert picture["type"] == "image_pil" and text["type"] == "text"
    return picture["image_pil"], text["text"]


def answer(image: Image.Image, prompt: str, params: SamplingParams) -> Any:
    """Return what an image of this colour is called; a red one loops, until it is penalised."""
    red, green, blue = np.asarray(image.convert("RGB"), dtype=np.float64).mean((0, 1)).round().astype(int)
    text = f"A picture of {red} {green} {blue}, {len(prompt)} letters, {params.seed} "
    if red > 2 * max(green, 1) and params.repetition_penalty == 1.0:
        text = "There is a red chair. " * 12
    words = text.split(" ")
    is_cut = len(words) > (params.max_tokens or 0)
    likely = {1: Logprob(-0.1, 1, " Yes"), 2: Logprob(-3.0, 2, "No"), 3: Logprob(-4.0, 3, None)}
    return SimpleNamespace(
        text=" ".join(words[: params.max_tokens]),
        token_ids=words[: params.max_tokens],
        finish_reason="length" if is_cut else "stop",
        logprobs=[likely] if params.logprobs else None,
    )


def vllm_module() -> ModuleType:
    """Return a fresh module, to be put among `sys.modules` as `vllm`, and its `exceptions`."""
    module = ModuleType("vllm")
    exceptions = ModuleType("vllm.exceptions")
    exceptions.VLLMClientError = VLLMClientError
    module.__spec__ = ModuleSpec("vllm", None)
    names = {"LLM": LLM, "SamplingParams": SamplingParams, "EngineArgs": EngineArgs, "__version__": "0.29.0"}
    for name, value in {**names, "loaded": [], "calls": [], "answer": answer, "exceptions": exceptions}.items():
        setattr(module, name, value)
    return module

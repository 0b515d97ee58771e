"""The recipe table `[captioning.vllm]`; it loads nothing of vLLM."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from pipelines.recipe import Decides, TableConfig

# What vLLM calls by these names is said elsewhere in the recipe, or is settled by how images are captioned.
SAID_ELSEWHERE: Mapping[str, str] = {
    "model": "captioning.model",
    "revision": "captioning.revision",
    "tokenizer_revision": "captioning.revision",
    "dtype": "captioning.dtype",
    "seed": "captioning.seed",
    "max_num_seqs": "captioning.batch_size",
    "tensor_parallel_size": "captioning.vllm.tensor_parallel_size",
    "pipeline_parallel_size": "captioning.vllm.tensor_parallel_size",
    "gpu_memory_utilization": "captioning.vllm.gpu_memory_utilization",
    "max_model_len": "captioning.vllm.max_model_len",
    "trust_remote_code": "captioning.vllm.trust_remote_code",
    "data_parallel_size": "engine.num_workers",
    "distributed_executor_backend": "engine.gpus_per_worker",
    "limit_mm_per_prompt": "nothing: each prompt has one image",
    "generation_config": "nothing: the recipe's decoding counts",
    "disable_log_stats": "nothing: progress is told by the command",
    "use_tqdm_on_load": "nothing: progress is told by the command",
}


class VllmConfig(TableConfig):
    """`[captioning.vllm]`: the model of `engine = "vllm"`, loaded by each worker into its own GPUs."""

    tensor_parallel_size: int = Field(
        default=1, ge=1, description="GPUs that one model is spread over; engine.gpus_per_worker is the same number"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Share of a GPU's memory for weights, activations and the key-value cache"
    )
    max_model_len: Decides[int] = Field(
        default=0, ge=0, description="Tokens of prompt, image and caption at most; 0 = the model's own context"
    )
    image_short_side_pixels: Decides[int] = Field(
        default=0, ge=0, description="Larger images are given with this short side; 0 = as they are; 336 for LLaVA-1.5"
    )
    trust_remote_code: bool = Field(
        default=False, description="Whether Python files of the model's repository may be run"
    )
    engine_args: Decides[dict[str, Any]] = Field(
        default={}, description="More of vLLM's EngineArgs by name, such as quantization, mm_processor_kwargs"
    )

    @field_validator("engine_args")
    @classmethod
    def _check_engine_args(cls, engine_args: dict[str, Any]) -> dict[str, Any]:
        for name in engine_args:
            if name in SAID_ELSEWHERE:
                raise ValueError(f"{name!r} is not said here: set {SAID_ELSEWHERE[name]}")
        return engine_args

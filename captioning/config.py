"""The recipe table `[captioning]`."""

import hashlib
import keyword
import re
import string
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from captioning.claims.config import ClaimsConfig
from captioning.quality_config import QualityConfig
from captioning.vllm_config import VllmConfig
from encoders.chat_config import ChatServerConfig
from pipelines.columns.known_scores import KNOWN_SCORES
from pipelines.recipe import Decides, TableConfig

DESCRIBE = "Describe this image and its style in a very detailed manner"
DEFAULT_PROMPTS = {
    "default": DESCRIBE,
    "img2dataset": DESCRIBE + '. The image is known to have the following alt text: "{alt_text}"',
}
# Names of columns of given captions; those of captions/<shard>.parquet that mean something else are taken.
COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]*")
TAKEN_COLUMNS = (
    *("key", "shard", "alt_text", "caption_raw", "first_caption", "prompt", "num_tokens", "finish_reason", "flags"),
    *("repeated_ngram_ratio", "alt_text_overlap", "clip_score", "width", "height", "reject"),
)
# Names that mean something else than a caption wherever captions are named, and keys that all passes share.
NAMES_TAKEN_OF_PASSES = ("caption", *KNOWN_SCORES)
NOT_OF_PASSES = frozenset(("passes", "claims", "only"))


class LoopRetryConfig(TableConfig):
    """`[captioning.loop_retry]`: captions that loop are asked for a second time, with a mild repetition penalty.

    Part of the decoding, like `temperature`: changing it captions anew, unlike a threshold of `[captioning.quality]`.
    """

    repetition_penalty: Decides[float] = Field(
        default=1.1, ge=1, le=2, description="Penalty of the second try, as transformers defines it; 1 = no second try"
    )
    ngram_words: Decides[int] = Field(
        default=4, ge=1, le=20, description="Length of the word n-grams counted for loops"
    )
    max_repeated_ngram_ratio: Decides[float] = Field(
        default=0.3, ge=0, le=1, description="Captions with a larger share of repeated n-grams are asked for again"
    )
    by_script: Decides[bool] = Field(
        default=False,
        description="Whether n-grams are of letters in scripts without spaces, as for the flag `loop`",
    )


class CaptioningConfig(TableConfig):
    """`[captioning]`: the model, what it is asked, and how it decodes."""

    engine: Decides[str] = Field(
        default="transformers",
        pattern="^(transformers|generate|vllm|openai|given)$",
        description="transformers: a LLaVA in the worker; generate: any other model of images and text there, slower; "
        "vllm: vLLM in the worker, see [captioning.vllm]; "
        "openai: a chat server, see [captioning.server]; given: no model, see `table`",
    )
    table: str | dict[str, str] = Field(
        default="",
        description='With `engine = "given"`: where captions are, as "files#key,caption" or one such address for each '
        'column, {caption = "…", short = "…"}; "#txt" is a text of the samples, empty the text beside the image',
    )
    model: str = Field(
        default="llava-hf/llava-1.5-7b-hf",
        description="Hub id or local folder of a model that `engine` takes; with openai, its name at the server",
    )
    revision: str | None = Field(default=None, description="Commit of the hub model; pin it for a run that matters")
    shards: Sequence[str] = Field(default=("*",), min_length=1, description="Names of the shards to caption (fnmatch)")
    prompts: Decides[dict[str, str]] = Field(
        default=DEFAULT_PROMPTS,
        description="What is asked, by shard name (fnmatch); else `img2dataset` of images with a text of their own, "
        "which is filled in for {alt_text}, and `default` of the others",
    )
    max_alt_text_chars: Decides[int] = Field(
        default=300, ge=1, description="Characters of an alt text that go into the prompt; the column keeps all"
    )
    max_aspect_ratio: Decides[float] = Field(
        default=20.0, ge=1, description="Images whose long side is more than this times the short one are rejected"
    )
    dtype: Decides[str] = Field(
        default="auto",
        pattern="^(auto|float32|bfloat16|float16)$",
        description="Weights and activations; auto is bfloat16 on a GPU and float32 on a CPU",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one",
    )
    batch_size: int = Field(
        default=0,
        ge=0,
        description="Captions decoded at a time; 0 = what its part of a GPU holds, 32 on a CPU and with `generate`",
    )
    max_new_tokens: Decides[int] = Field(default=256, ge=1, description="Longest caption, in tokens of the model")
    temperature: Decides[float] = Field(
        default=0.0, ge=0, le=2, description="0 decodes greedily; LLaVA's own demo and the paper's code use 0.2"
    )
    seed: Decides[int] = Field(default=0, ge=0, description="Seed of the sampling, which each key turns into its own")
    num_decode_threads: int = Field(
        default=2, ge=1, le=64, description="Threads that decode and resize images ahead of the device"
    )
    max_reject_fraction: float = Field(
        default=0.05, ge=0, le=1, description="Share of samples that may be unusable before the command fails"
    )
    retry_rejects: bool = Field(
        default=False, description="Try the samples again that earlier runs rejected, and only those"
    )
    clip_model: str | None = Field(
        default=None,
        description="Hub id or local folder of a CLIP that scores captions against their images",
    )
    loop_retry: Decides[LoopRetryConfig] = Field(
        default=LoopRetryConfig(), description="The second try of captions that loop"
    )
    server: ChatServerConfig = Field(default=ChatServerConfig(), description="The chat server of `engine = openai`")
    vllm: VllmConfig = Field(default=VllmConfig(), description="The model of `engine = vllm`")
    quality: QualityConfig = Field(default=QualityConfig(), description="What is flagged")
    claims: ClaimsConfig = Field(
        default=ClaimsConfig(), description="What is asked back about captions, see docs/CURATION.md"
    )
    passes: dict[str, dict[str, Any]] = Field(
        default={},
        description="More captions of each image, see docs/CAPTIONING.md: by the name of the column the keys of "
        "[captioning] that it changes, or the rule by which it is cut of others",
    )
    only: str = Field(
        default="",
        description="Names of the columns to make now, with commas between them: caption, or passes; empty makes all",
    )

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, prompts: dict[str, str]) -> dict[str, str]:
        merged = DEFAULT_PROMPTS | prompts
        for name in prompts.keys() & {"sa1b", "imagenet", "generic"}:
            raise ValueError(f"prompt {name!r}: shards are told by their names; use a pattern of those, such as 'sa_*'")
        for name, template in merged.items():
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
            if fields - {"alt_text"} or "<image>" in template:
                raise ValueError(f"prompt {name!r} may hold {{alt_text}} and no other placeholder, nor <image>")
        if "{alt_text}" in merged["default"]:
            raise ValueError("prompt 'default' may not hold {alt_text}: it is what images without one are asked")
        return merged

    @field_validator("table")
    @classmethod
    def _check_table(cls, table: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(table, dict):
            if "caption" not in table:
                raise ValueError("one of the columns is called caption; the others are beside it")
            for name, address in table.items():
                if not COLUMN_NAME.fullmatch(name) or name in TAKEN_COLUMNS:
                    raise ValueError(f"column {name!r}: use small letters, digits and _, and no name that is taken")
                if not address:
                    raise ValueError(f'column {name!r}: write files#key,text, or "#" for the text beside the image')
        return table

    @field_validator("passes")
    @classmethod
    def _check_passes(cls, passes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, keys in passes.items():
            if not COLUMN_NAME.fullmatch(name):
                raise ValueError(f"pass {name!r}: use small letters, digits and _: it names a column and a folder")
            if name in (*NAMES_TAKEN_OF_PASSES, *TAKEN_COLUMNS) or any(name in own for own in KNOWN_SCORES.values()):
                raise ValueError(f"pass {name!r}: other columns of the samples are called so; take another name")
            if keyword.iskeyword(name):
                raise ValueError(f"pass {name!r} is a word of expressions, where nobody could name it")
            if wrong := sorted(keys.keys() & NOT_OF_PASSES):
                raise ValueError(f"pass {name!r}: {wrong[0]!r} is one for all passes: it stands in [captioning] alone")
        return passes

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if isinstance(self.table, dict) and (both := self.table.keys() & self.passes.keys()):
            raise ValueError(f"{min(both)!r} is a column of `table` and a pass: call one of them otherwise")
        if self.table and not self.is_given:
            raise ValueError(f'table = {self.table!r} is for engine = "given", and engine is {self.engine!r}')
        return self

    @property
    def is_given(self) -> bool:
        """Whether captions are there, and no model is asked."""
        return self.engine == "given"

    @property
    def prompts_sha256(self) -> str:
        """Hash of the prompts' text, for the manifest."""
        lines = "\0".join(f"{name}\0{self.prompts[name]}" for name in sorted(self.prompts))
        return hashlib.sha256(lines.encode()).hexdigest()

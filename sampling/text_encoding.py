"""Prompts to text embeddings, before any image is drawn: encoded here and now, or read from where they were kept."""

# L text tokens, D text width

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from encoders.devices import choose_device
from encoders.opening import open_text_encoder
from encoders.text import DEFAULT_CLEANING, TextEncoder
from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command, typed_path
from pipelines.engine.progress import get_logger
from pipelines.store.families import NULL_CAPTION_FILE, TEXT_STORAGE_DTYPES, mend_null_caption
from pipelines.store.feature_store import load_index, read_payload
from pipelines.store.files import atomic_file, remove_temporary_files
from pipelines.store.manifest import read_manifest, require_same
from sampling.agreement import check_null_caption
from sampling.config import SamplingConfig
from sampling.requests import ImageRequest

log = get_logger("sampling")

STORED_DTYPES = {"bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


def load_texts(requests: Sequence[ImageRequest], config: SamplingConfig, text: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return an embedding [L, D] on the CPU for each `text_id` of `requests`, and for the negative prompt.

    `text` names the checkpoint's encoder. An encoder that this loads is gone from memory when it returns.

    Raises:
        UserError: kept embeddings lack a prompt or were made with another token limit, or an embedding is not finite.
    """
    prompts = list(dict.fromkeys([config.negative_prompt, *(request.prompt for request in requests)]))
    if config.text_encoder != "precomputed":
        return encode_prompts(prompts, config, text)
    path = typed_path(config.text_embeddings)
    if not config.reads_features:
        embeddings = _read_embeddings(path, prompts, text)
    elif config.negative_prompt:
        raise UserError(f"sampling.negative_prompt {config.negative_prompt!r}: text features hold only that of ''")
    else:
        captions, null = _read_features(path, [request.key for request in requests], text)
        embeddings = {"": null, **captions}
    finds = f"`{typed_command('verify', {'run': path.parent.parent})}` finds what is damaged"
    mend = finds if config.reads_features else "write it again with sampling.write_embeddings"
    for name, embedding in embeddings.items():
        if not embedding.float().isfinite().all():
            raise UserError(f"sampling.text_embeddings {path}: the embedding of {name[:80]!r} is not finite; {mend}")
    return embeddings


def text_id(request: ImageRequest, config: SamplingConfig) -> str:
    """Return what an embedding is found by: its key in text features, where texts may repeat; else its prompt."""
    return request.key if config.reads_features else request.prompt


def encode_prompts(prompts: Sequence[str], config: SamplingConfig, text: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return an embedding [L, D] of each of the distinct `prompts`; the encoder is freed before this returns.

    Raises:
        UserError: an embedding is not finite.
    """
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    device = choose_device(config.device, key="sampling.device")
    encoder = open_text_encoder(
        text["model"],
        text["revision"],
        max_tokens=text["max_tokens"],
        cleaning=text.get("cleaning", DEFAULT_CLEANING),
        device="cpu" if config.text_encoder == "cpu" else device,
        dtype=config.text_dtype,
        tokenizer=text.get("tokenizer"),
        is_8bit=config.text_encoder == "8bit",
        key="text encoder",
    )
    _warn_of_unread(prompts, encoder, text["model"])
    embeddings = dict(zip(prompts, encoder.encode(prompts), strict=True))
    del encoder
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for prompt, embedding in embeddings.items():
        if not embedding.isfinite().all():
            other = (
                ""
                if config.text_dtype == "float32"
                else f", or sampling.text_dtype {config.text_dtype!r}: 'float32' is wider"
            )
            raise UserError(
                f"text encoder {text['model']} gives no finite embedding of {prompt[:80]!r}: its weights are at fault, "
                f"put them there anew{other}"
            )
    if "" in embeddings and "null_caption" in text:
        _check_null_caption(embeddings[""], text)
    return embeddings


def _check_null_caption(embedding: Tensor, text: Mapping[str, Any]) -> None:
    """Compare what the encoder gives for no text with the null caption in the original file that is drawn with."""
    from pixart.layouts import NULL_CAPTION
    from pixart.tensor_files import read_weight_file

    file = text["null_caption"]["file"]
    stored = read_weight_file(Path(file)).tensors[NULL_CAPTION]
    is_known = text["null_caption"]["is_encoder_known"]
    check_null_caption(stored, embedding, file=file, encoder=text["model"], is_known=is_known)


def _warn_of_unread(prompts: Sequence[str], encoder: TextEncoder, model: str) -> None:
    """Name the words of prompts that the encoder cannot read, and prompts of which nothing is left."""
    kinds = encoder.token_kinds
    for prompt, tokens in zip(prompts, encoder.tokenize(prompts), strict=True):
        is_unreadable = bool(prompt.strip()) and kinds.is_unreadable(tokens)
        if not is_unreadable and not kinds.num_unread(tokens):
            continue
        words = list(dict.fromkeys(prompt.split()))
        unread = [word for word, found in zip(words, encoder.tokenize(words), strict=True) if kinds.num_unread(found)]
        shown = ", ".join(repr(word[:80]) for word in unread) or repr(prompt[:80])
        nothing = ", and nothing else is left of the prompt" if is_unreadable else ""
        log.warning(f"text encoder {model} cannot read {shown} of the prompt {prompt[:80]!r}{nothing}")


def write_embeddings(
    path: Path, requests: Sequence[ImageRequest], config: SamplingConfig, text: Mapping[str, Any]
) -> int:
    """Write the embeddings of all prompts of `requests` to a .safetensors file; returns how many there are."""
    embeddings = load_texts(requests, config, text)
    # names of tensors are numbers, as safetensors keeps one name for itself
    tensors = {str(number): embedding.contiguous() for number, embedding in enumerate(embeddings.values())}
    metadata = {
        "prompts": json.dumps(list(embeddings)),
        "max_tokens": str(text["max_tokens"]),
        "text_model": text["model"],
    }
    remove_temporary_files(path.parent, path.name)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return len(embeddings)


def _read_embeddings(path: Path, prompts: Sequence[str], text: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the `prompts` out of a file of `write_embeddings`."""
    if not path.is_file():
        raise MissingFileError(f"sampling.text_embeddings {path} does not exist: sampling.write_embeddings writes it")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            mend = "give sampling.write_embeddings another file, which writes them for this checkpoint, and read that"
            require_same("max_tokens", str(text["max_tokens"]), metadata.get("max_tokens"), where=str(path), mend=mend)
            _warn_of_other_model(metadata.get("text_model"), text, path)
            numbers = {prompt: str(number) for number, prompt in enumerate(json.loads(metadata.get("prompts", "")))}
            if missing := [prompt for prompt in prompts if prompt not in numbers]:
                raise UserError(f"sampling.text_embeddings {path} lacks {_describe(missing)}")
            return {prompt: file.get_tensor(numbers[prompt]) for prompt in prompts}
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(
            f"sampling.text_embeddings {path} is damaged ({error}); write it again with sampling.write_embeddings"
        ) from None


def _read_features(directory: Path, keys: Sequence[str], text: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Read the first caption of each sample of `keys`, and the null caption, out of a run's text features."""
    manifest = read_manifest(directory)
    stored = manifest.fact("text", where=directory)
    mend = "leave sampling.text_encoder = 'precomputed' out: prompts are then encoded as the checkpoint reads them"
    require_same("max_tokens", text["max_tokens"], stored["max_tokens"], where=str(directory), mend=mend)
    _warn_of_other_model(stored["model"], text, directory)
    columns = ["key", "shard", "caption_index", "offset", "scale_offset", "num_tokens", "nbytes"]
    table = load_index(directory, sorted(manifest.shards), columns=columns)
    is_first = (pc.field("caption_index") == 0) & pc.field("offset").is_valid()
    found = table.filter(is_first & pc.field("key").isin(list(keys)))
    rows = {row["key"]: row for row in found.to_pylist()}
    if missing := [key for key in keys if key not in rows]:
        raise UserError(f"sampling.text_embeddings {directory} has no caption of {_describe(missing)}")
    shards = {row["shard"] for row in rows.values()}
    tars = {name: np.memmap(directory / f"{name}.tar", np.uint8, mode="r") for name in shards}
    captions = {key: _restore(tars[row["shard"]], row, stored["storage"]) for key, row in rows.items()}
    path = directory / NULL_CAPTION_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return captions, file.get_tensor("embedding_0")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); {mend_null_caption()}") from None


def _warn_of_other_model(model: str | None, text: Mapping[str, Any], path: Path) -> None:
    """The same encoder may lie elsewhere under another name, so this is for the user to judge."""
    if model != text["model"]:
        log.warning(f"sampling.text_embeddings {path} is of {model}, the checkpoint reads {text['model']}'s")


def _restore(tar: np.ndarray, row: Mapping[str, Any], storage: str) -> Tensor:
    dtype = TEXT_STORAGE_DTYPES[storage]
    num_tokens = row["num_tokens"]
    shape = (num_tokens, row["nbytes"] // num_tokens // np.dtype(dtype).itemsize)
    values = torch.from_numpy(read_payload(tar, row["offset"], dtype=dtype, shape=shape).copy())  # [L, D]
    values = values.view(STORED_DTYPES[storage])
    if row["scale_offset"] is None:
        return values
    scale = torch.from_numpy(read_payload(tar, row["scale_offset"], dtype="float32", shape=(num_tokens,)).copy())
    return values.float() * scale[:, None]


def _describe(missing: Sequence[str]) -> str:
    more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
    return f"{missing[0][:80]!r}{more}"

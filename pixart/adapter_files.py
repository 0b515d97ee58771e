"""Files of adapters: peft's format with diffusers' names of layers, as others write and open it, and its kin.

peft opens what is written here on diffusers' `PixArtTransformer2DModel` (`PeftModel.from_pretrained`), and the weights'
file says by itself what it is multiplied by. Read, too, are peft's files of others, the
`pytorch_lora_weights.safetensors` that diffusers' scripts leave, and LoRA in the words of kohya (`lora_down`, `alpha`)
on diffusers' names, with dots or as OneTrainer writes them (`lora_transformer_transformer_blocks_0_attn1_to_q`).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from errors import MissingFileError, UserError
from pixart.adapter_layers import AdapterShape, layer_names, scale_of
from pixart.adapters import DOWN, MAGNITUDE, UP, Adapter, LowRank, lora_config, trained_names, trained_parts
from pixart.belonging import METADATA, belonging_of, parse_note, read_header
from pixart.layouts import require_finite
from pixart.model import PixArtConfig
from pixart.tensor_files import read_weight_file
from pixart.weight_files import read_json

ADAPTER_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
# What a folder may hold, the first there is.
FILE_NAMES = (ADAPTER_NAME, "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
PREFIX = "base_model.model."
# In front of layers' names in files of peft, diffusers and PixArt's own script, ComfyUI, OneTrainer and kohya.
PREFIXES = (PREFIX, "transformer.", "unet.", "diffusion_model.", "lora_transformer_", "lora_unet_")
DIFFUSERS_METADATA = "lora_adapter_metadata"
# The words for the parts of a change, behind the layer's name; peft and diffusers may leave an adapter's own name in.
PARTS = {
    DOWN: DOWN, "lora_down": DOWN, "lora.down": DOWN,
    UP: UP, "lora_up": UP, "lora.up": UP,
    MAGNITUDE: MAGNITUDE,
    "alpha": "alpha",
}  # fmt: skip
KEY = re.compile(rf"(?P<layer>.+)\.(?P<part>{'|'.join(map(re.escape, PARTS))})(\.(?!bias)[^.]+)?(\.weight)?")
# Ways to begin that change the weights beside the adapter, too: such a file is nothing without those.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga")
# Numbers of peft's settings: of all layers, and by pattern of layers' names in `<word>_pattern`.
NUMBERS = {"rank": "r", "alpha": "lora_alpha"}
# What multiplies a change, which the header of our files says as diffusers' files do.
SCALING = (*NUMBERS.values(), "use_rslora", "use_dora")
PLAIN_SETTINGS = {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None}


def write_adapter(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: PixArtConfig,
    *,
    shape: AdapterShape,
    belongs_to: Mapping[str, Any],
) -> None:
    """Write adapters that `add_adapters` has made as a folder that peft opens on diffusers' transformer.

    Args:
        folder: to write into.
        weights: by their names in our network.
        config: of that network.
        shape: what they are made like.
        belongs_to: what a reader must know of the weights that they change; JSON. `name` names them.
    """
    theirs = {ours: name for name, ours in layer_names(config).items()}
    layers = trained_parts(weights)
    tensors = {}
    for layer, parts in layers.items():
        for part, value in parts.items():
            # peft's files have the lengths of rows without `.weight`, for those of its first version.
            suffix = part if part == MAGNITUDE else f"{part}.weight"
            tensors[f"{PREFIX}{theirs[layer]}.{suffix}"] = value.contiguous()
    settings = lora_config(shape, [], base=belongs_to.get("name")).to_dict()
    settings |= {"target_modules": sorted(theirs[layer] for layer in layers), "inference_mode": True}
    noted = {METADATA: dict(belongs_to), DIFFUSERS_METADATA: {f"transformer.{key}": settings[key] for key in SCALING}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ADAPTER_NAME
    path.touch()
    mode = path.stat().st_mode
    header = {key: json.dumps(value, sort_keys=True) for key, value in noted.items()}
    save_file(tensors, path, metadata={"format": "pt", **header})
    path.chmod(mode)  # safetensors makes a file of its own, which its owner alone may read
    text = json.dumps(settings, indent=2, sort_keys=True, default=str)
    (folder / CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")


def read_trained(folder: Path, config: PixArtConfig) -> dict[str, Tensor]:
    """Return the weights that `write_adapter` wrote, by their names in our network."""
    tensors, _, _ = _read(folder / ADAPTER_NAME)
    return trained_names(_by_layer(tensors, config, name=str(folder)))


def read_adapter(path: Path, config: PixArtConfig) -> Adapter:
    """Open an adapter for a network of this shape: a file, or a folder of one.

    Raises:
        MissingFileError: there is no such file, or the folder has none.
        UserError: it is no adapter, damaged, or of another model; names it.
    """
    file = find_adapter_file(path)
    tensors, settings, belongs_to = _read(file)
    name = str(file)
    _require_plain(settings, name)
    _require_numbers(settings, name)
    layers = _by_layer(tensors, config, name=name)
    if whole := next(
        (key for key, value in tensors.items() if "alpha" not in key and not value.is_floating_point()), None
    ):
        dtype = str(tensors[whole].dtype).removeprefix("torch.")
        raise UserError(f"{name}: {whole} is {dtype}: adapters that were quantised are not read")
    require_finite({f"{layer}.{part}": value for layer in layers for part, value in layers[layer].items()}, where=name)
    theirs = {ours: their for their, ours in layer_names(config).items()}
    changes, assumed = {}, False
    for layer, parts in layers.items():
        rank = _rank(parts, theirs[layer], settings, name=name)
        alpha = parts["alpha"].item() if "alpha" in parts else _setting(settings, "alpha", theirs[layer])
        assumed |= alpha is None
        alpha = float(rank) if alpha is None else float(alpha)
        scale = scale_of(alpha, rank, rslora=bool(settings.get("use_rslora")))
        changes[layer] = LowRank(down=parts[DOWN], up=parts[UP], scale=scale, magnitude=parts.get(MAGNITUDE))
    note = f"{file} does not say its alpha: its rank is taken, a scale of 1, as diffusers does"
    return Adapter(path=file, layers=changes, belongs_to=belongs_to, notes=(note,) if assumed else ())


def find_adapter_file(path: Path) -> Path:
    """Return the file of an adapter that is named by its file or its folder; MissingFileError where there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"adapter {path} does not exist")
    found = next((path / name for name in FILE_NAMES if (path / name).is_file()), None)
    if found is None:
        raise MissingFileError(f"{path} is no adapter: the folder holds none of {', '.join(FILE_NAMES)}")
    return found


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return the tensors of a file, peft's settings of it, and what it says that it belongs to."""
    tensors = read_weight_file(file).tensors
    header = read_header(file)
    beside = file.parent / CONFIG_NAME
    if file.name in FILE_NAMES[:2] and beside.is_file():
        settings = read_json(beside)
    else:
        # diffusers writes them into the header, behind the name of the model that each is of
        noted = parse_note(header.get(DIFFUSERS_METADATA), file)
        settings = {key.rpartition("transformer.")[2]: value for key, value in noted.items()}
    return tensors, settings, belonging_of(header, file)


def _require_plain(settings: Mapping[str, Any], name: str) -> None:
    """Refuse settings of peft that are not computed here."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{name} is an adapter of peft's kind {kind}, but LoRA alone (with DoRA, rsLoRA) is merged")
    for key, plain in PLAIN_SETTINGS.items():
        if settings.get(key) not in (plain, None, [], False):
            raise UserError(f"{name}: its {key} is {settings[key]!r}, which is not merged")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGING_STARTS):
        raise UserError(
            f"{name} began as {start!r}, which changes the weights beside it: merge it with peft, where it was trained"
        )


def _require_numbers(settings: Mapping[str, Any], name: str) -> None:
    """Refuse ranks and alphas that are no numbers, and patterns that are none."""
    for word, key in NUMBERS.items():
        patterns = settings.get(f"{word}_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{name}: its {word}_pattern is {patterns!r}, not an object of patterns and numbers")
        for said, value in {key: settings.get(key), **patterns}.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not is_number:
                raise UserError(f"{name}: its settings say {said} = {value!r}, which is no finite number")
            try:
                re.compile(said)
            except re.error as error:
                raise UserError(f"{name}: its {word}_pattern has {said!r}, which is no pattern ({error})") from None


def _by_layer(tensors: Mapping[str, Tensor], config: PixArtConfig, *, name: str) -> dict[str, dict[str, Tensor]]:
    """Return the parts of each layer's change, by our names.

    Raises:
        UserError: it is no adapter, has other weights too, or layers that the model does not have.
    """
    theirs = layer_names(config)
    ours = theirs | {layer.replace(".", "_"): name for layer, name in theirs.items()}
    ours |= {layer: layer for layer in theirs.values()}
    matches = {key: KEY.fullmatch(key) for key in tensors}
    others = [key for key, match in matches.items() if match is None]
    if len(others) == len(tensors):
        some = f", but {others[0]!r} and the like: name whole weights as a checkpoint" if others else ""
        raise UserError(f"{name} is no adapter: it holds no {DOWN} and {UP}{some}")
    if others:
        raise UserError(f"{name}: {others[0]!r} is no low-rank change of a layer, and is not merged")
    layers: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, match in matches.items():
        assert match is not None
        layer = _without_prefixes(match["layer"])
        if layer not in ours:
            strangers.append(layer)
            continue
        parts, part = layers.setdefault(ours[layer], {}), PARTS[match["part"]]
        if part in parts:
            raise UserError(f"{name} has {part} of {layer} twice, one of them as {key!r}: it is of several adapters")
        parts[part] = tensors[key]
    if strangers:
        count = len(set(strangers))
        raise UserError(
            f"{name} is an adapter of another model: {count} of its layers, such as {strangers[0]!r}, are none of this "
            f"{config.title} of {config.num_layers} blocks"
        )
    for layer, parts in layers.items():
        if missing := {DOWN, UP} - parts.keys():
            raise UserError(f"{name} is damaged: {layer} has no {min(missing)}")
    return layers


def _without_prefixes(layer: str) -> str:
    for prefix in PREFIXES * 2:
        layer = layer.removeprefix(prefix)
    return layer


def _rank(parts: Mapping[str, Tensor], layer: str, settings: Mapping[str, Any], *, name: str) -> int:
    """Return the rank of a layer's change, on which its two matrices and the settings must agree."""
    down, up = parts[DOWN], parts[UP]
    rank = len(down)
    if down.dim() < 2 or up.dim() < 2 or up.shape[1] != rank or rank == 0:
        raise UserError(f"{name} is damaged: of {layer} {DOWN} is {tuple(down.shape)} and {UP} {tuple(up.shape)}")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise UserError(f"{name} is damaged: of {layer} alpha is {tuple(parts['alpha'].shape)}, and not one number")
    if settings.get("use_dora") and MAGNITUDE not in parts:
        raise UserError(f"{name} is damaged: its settings say use_dora, but {layer} has no {MAGNITUDE}")
    said = _setting(settings, "rank", layer)
    if said is not None and said != rank:
        raise UserError(f"{name}: {layer} has rank {rank}, but the settings beside it say {said}: they are of another")
    return rank


def _setting(settings: Mapping[str, Any], what: str, layer: str) -> Any:
    """Return peft's rank or alpha of a layer: the first pattern of its own that fits it, else that of all."""
    for pattern, value in (settings.get(f"{what}_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return settings.get(NUMBERS[what])

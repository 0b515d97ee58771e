"""Files of control branches, found by whatever names them: a stage, a checkpoint, a folder, a file, or the hub."""

from pathlib import Path

from encoders.weights import cached_hub_file, fetch_files, resolve_model
from errors import MissingFileError, UserError
from pipelines.as_typed import typed_path
from pipelines.store.checkpoints import named_checkpoint

# As diffusers names them.
CONFIG_NAME = "config.json"
FILE_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Of what training code leaves, such as PixArt-delta's .pth; nothing else of the hub's ends so.
FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def find_branch(location: str, *, key: str) -> Path:
    """Return the file of a control branch; whether it is whole, and of which base, `pixart.control_files` finds out.

    Args:
        location: a stage of training or a checkpoint that has a branch, by its folder; a folder; a file; or what the
            hub calls one of the latter two.
        key: of the recipe, to begin messages with.

    Raises:
        MissingFileError: it is not there.
        UserError: it is a checkpoint of something else, or the hub has none of that name.
    """
    path = typed_path(location)
    if not path.exists():
        path = _of_hub(location, key=key)
    checkpoint = named_checkpoint(path)
    if checkpoint is not None and not checkpoint.has_control:
        kind = "adapters" if checkpoint.has_adapters else "a whole network"
        raise UserError(f"{key} {path} is a checkpoint of {kind}, and no control branch: name a stage that trains one")
    return _file_of(path if checkpoint is None else checkpoint.weights, key=key)


def _file_of(path: Path, *, key: str) -> Path:
    if path.is_file():
        return path
    for folder in (path, path / "controlnet"):
        if (found := next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)) is not None:
            return found
    raise MissingFileError(f"{key}: {path} is no control branch: the folder holds none of {', '.join(FILE_NAMES)}")


def _of_hub(location: str, *, key: str) -> Path:
    """Return a file or folder of the hub's, from its cache or fetched into it."""
    if location.lower().endswith(FILE_SUFFIXES):
        return cached_hub_file(location, key=key)
    try:
        source = resolve_model(location)
    except MissingFileError as error:
        raise MissingFileError(f"{key}: {error}") from None
    if (folder := Path(source.location)).is_dir():
        return folder
    names = (CONFIG_NAME, *FILE_NAMES)
    return fetch_files(source, [*names, *(f"controlnet/{name}" for name in names)], key=key)

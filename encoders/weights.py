"""Where a model's files are, in a local folder or the hub's cache, and whether all weights are among them."""

import functools
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError, describe_unfetched, is_out_of_memory
from pipelines.as_typed import typed_path
from pipelines.store.files import sha256_file, sha256_text
from pipelines.store.state_files import read_state

REPOSITORY = Path(__file__).resolve().parent.parent
# Files of weights of transformers and diffusers, whole or in pieces, with the variant (fp16) on either side of those.
WEIGHT_FILE = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:\.(\w+))??(?:-\d+-of-\d+)?(?:\.(\w+))??\.(?:safetensors|bin)"
)

HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
# A folder of one of the hub's repositories, such as `someone/model/vae`.
HUB_FOLDER = re.compile(rf"(?P<repository>{HUB_ID.pattern})/(?P<folder>[\w./-]+)")


@dataclass(frozen=True)
class ModelSource:
    """What to hand to `from_pretrained` (`location`, `revision`), and what goes into fingerprints (`identity`)."""

    location: str
    revision: str | None
    identity: str


def resolve_model(model_id: str, revision: str | None = None) -> ModelSource:
    """Find a model by local folder (relative to the working folder or the repository), or else by hub id.

    A folder's identity is a hash over the bytes of its files; a hub model's is `id@revision`. A folder of a hub's
    repository is one of those that are in the hub's cache.

    Raises:
        MissingFileError: `model_id` looks like a path and there is no such folder.
    """
    for root in (Path(), REPOSITORY):
        folder = root / typed_path(model_id)
        if folder.is_dir():
            return ModelSource(str(folder), None, _folder_identity(folder))
    if match := HUB_FOLDER.fullmatch(model_id):
        cached = model_folder(model_id, revision)
        if cached is None:
            raise MissingFileError(
                f"model folder {model_id} does not exist; if it is one of the hub's {match['repository']}, run "
                f"`hf download {match['repository']} --include '{match['folder']}/*'`"
            )
        return ModelSource(str(cached), None, f"{model_id}@{revision or 'main'}")
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise MissingFileError(f"model folder {model_id} does not exist")
    return ModelSource(model_id, revision, f"{model_id}@{revision or 'main'}")


def model_folder(model_id: str, revision: str | None = None) -> Path | None:
    """Return where a model's files are, a local folder or the hub's cache, None if they are in neither.

    Unlike `resolve_model` it reads none of them.
    """
    for root in (Path(), REPOSITORY):
        folder = root / typed_path(model_id)
        if folder.is_dir():
            return folder
    match = HUB_FOLDER.fullmatch(model_id)
    if match is None and not HUB_ID.fullmatch(model_id):
        return None
    repository, name = (match["repository"], f"{match['folder']}/config.json") if match else (model_id, "config.json")
    path = find_file(ModelSource(repository, revision, ""), name)
    return None if path is None else path.parent


def cached_hub_file(model_id: str, revision: str | None = None, *, key: str) -> Path:
    """Return a file `org/name/….pth` of a hub's repository that is in the cache.

    Raises:
        MissingFileError: it is not, or can be of no repository; names the recipe `key` and the way out.
    """
    match = HUB_FOLDER.fullmatch(model_id)
    if match is None:
        raise MissingFileError(f"{key}: {model_id} does not exist")
    repository, name = match["repository"], match["folder"]
    path = find_file(ModelSource(repository, revision, ""), name)
    if path is None:
        raise MissingFileError(
            f"{key}: {model_id} does not exist; if it is a file of the hub's {repository}, run "
            f"`hf download {repository} {name}`"
        )
    return path


def of_transformer(model_id: str) -> str:
    """Return the hub's repository whose `transformer` is named, as of a pipeline that is what is taken; else the id."""
    match = HUB_FOLDER.fullmatch(model_id)
    is_its = match is not None and match["folder"].rstrip("/") == "transformer"
    return hub_repository(model_id) or model_id if is_its else model_id


def hub_repository(model_id: str) -> str | None:
    """Return the id of the hub's repository that a model is of, None of one that is named by a local path."""
    match = HUB_FOLDER.fullmatch(model_id) or HUB_ID.fullmatch(model_id)
    if match is None or any((root / typed_path(model_id)).exists() for root in (Path(), REPOSITORY)):
        return None
    return match.groupdict().get("repository") or match[0]


def identity_of(path: Path) -> str:
    """Return what tells the weights of a folder or a file from all others: a hash over the bytes."""
    return _folder_identity(path) if path.is_dir() else f"sha256:{sha256_file(path)}"


def require_model(source: ModelSource, *, key: str) -> None:
    """Check that a folder holds weights, and a hub model is in the local cache or can be fetched, before work starts.

    Raises:
        UserError: names the recipe `key`, the model and the way out, in one line.
    """
    if (folder := Path(source.location)).is_dir():
        _require_weight_files(folder, f"{key} {source.location!r}")
        return
    fetch_files(source, ["*.json"], key=key)


def fetch_files(source: ModelSource, patterns: Sequence[str], *, key: str) -> Path:
    """Return the folder of a hub model in the local cache, after files with such names have been fetched into it.

    Raises:
        UserError: it is not there and cannot be fetched; names the recipe `key`, the model and the way out.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    silence = hub_silence()
    try:
        folder = snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=list(patterns),
            local_files_only=silence is not None,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{key} = {source.location!r} ({source.revision or 'main'}) is no local folder and not in the hub cache, "
            f"and cannot be downloaded ({silence or type(error).__name__}); give a local folder or run "
            f"`hf download {source.location}`"
        ) from None
    return Path(folder)


@functools.cache
def hub_silence() -> str | None:
    """Return why the hub is not to be asked, or None if it answers; it is asked once.

    Its library, and those that ask it for files that a model may lack, would ask six times for each, for 23 seconds.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - of whichever library it asks by
        return f"{constants.ENDPOINT} does not answer: {str(error) or type(error).__name__}"
    return None


def loadable(source: ModelSource, *, key: str) -> str:
    """Return what libraries load a model from: its folder, in the cache where the hub does not answer, or its id.

    Raises:
        UserError: the hub does not answer, and the model is not in the cache; names `key`.
    """
    if Path(source.location).is_dir() or hub_silence() is None:
        return source.location
    return str(fetch_files(source, ["config.json"], key=key))


def _require_weight_files(folder: Path, named: str) -> None:
    """Refuse a folder without weights, and one whose weights are known by their names or first bytes to be no whole."""
    files = {path.name: path for path in folder.iterdir() if WEIGHT_FILE.fullmatch(path.name)}
    wanted = set(files)
    for index in folder.glob("*.index*.json"):
        wanted |= set(read_state(index, mend="fetch the model again").get("weight_map", {}).values())
    if not wanted:
        raise MissingFileError(f"{named} cannot be loaded: the folder holds no weights (model.safetensors or the like)")
    if missing := sorted(wanted - set(files)):
        raise MissingFileError(f"{named} cannot be loaded: {missing[0]}, which its index names, is missing")
    for name in sorted(files):
        with files[name].open("rb") as file:
            fault = describe_unfetched(file.read(1024))
        if fault is not None:
            raise UserError(f"{named} cannot be loaded: {name} {fault}")


def find_file(source: ModelSource, name: str) -> Path | None:
    """Return a file of a model in its local folder or in the hub's cache, None if it is in neither."""
    folder = Path(source.location)
    if folder.is_dir():
        return path if (path := folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source.location, name, revision=source.revision)
    except HFValidationError:  # a path of two names, which no repository can have
        return None
    return Path(cached) if isinstance(cached, str) else None


def read_config(source: ModelSource) -> dict[str, Any] | None:
    """Return a model's `config.json`, None when a hub model is not in the cache yet.

    Raises:
        MissingFileError: a local folder has none.
    """
    path = find_file(source, "config.json")
    if path is None and Path(source.location).is_dir():
        raise MissingFileError(f"{source.location} has no config.json: it is not a folder that a model was saved in")
    return None if path is None else read_state(path, mend="fetch the model again")


def is_model_here(source: ModelSource) -> bool:
    """Whether a model's weights are in a local folder or the hub's cache."""
    folder = Path(source.location)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(source.location, revision=source.revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return False
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def load_pretrained(
    model_class: Any, source: ModelSource, *, settings: Mapping[str, Any], key: str, hint: str = ""
) -> Any:
    """Load a frozen model of transformers or diffusers, on the CPU.

    Args:
        model_class: that has `from_pretrained`.
        source: where its files are.
        settings: what `from_pretrained` is told beside that, such as the dtype.
        key: of the recipe, or what else names the model in an error.
        hint: what may be wrong with a model that lacks weights.

    Raises:
        UserError: its files are missing or broken, or lack weights; names `key`.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    location = loadable(source, key=key)
    named, folder = f"{key} {source.location!r}", Path(location)
    if folder.is_dir():
        read_config(source)  # the libraries' words for one that is not there are of models on the hub
    kind = _weights_kind(folder, named) if folder.is_dir() else {}
    try:
        model, loading = model_class.from_pretrained(
            location,
            revision=source.revision or "main",
            output_loading_info=True,
            **kind,
            **settings,
        )
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        is_of_the_file = not isinstance(error, RuntimeError) or "PytorchStreamReader" in str(error)
        if not is_of_the_file or is_out_of_memory(error):
            raise
        raise UserError(f"{named} cannot be loaded: {_describe_damage(folder, error)}") from error
    _require_complete(loading, f"{named} lacks weights of a {type(model).__name__}{hint}")
    return model.eval().requires_grad_(False)


def _weights_kind(folder: Path, named: str) -> dict[str, Any]:
    """Return what the libraries must be told to find a folder's weights: a variant, or that they are pickles.

    Raises:
        UserError: there are several variants, and no plain weights.
    """
    matches = [match for path in folder.iterdir() if (match := WEIGHT_FILE.fullmatch(path.name))]
    variants = sorted({match[1] or match[2] or "" for match in matches})
    if not variants:
        return {}
    if variants[0] and len(variants) > 1:
        raise UserError(f"{named} holds weights as {' and as '.join(variants)}: keep the files of one of them")
    chosen = [match[0] for match in matches if (match[1] or match[2] or "") == variants[0]]
    kind: dict[str, Any] = {"variant": variants[0]} if variants[0] else {}
    is_pickled = not any(name.endswith(".safetensors") for name in chosen)
    return kind | {"use_safetensors": False} if is_pickled else kind


def _describe_damage(folder: Path, error: Exception) -> str:
    """Say what is wrong with a model's files; never with the advice of torch to unpickle whatever they hold."""
    for path in sorted(folder.glob("*")):
        if WEIGHT_FILE.fullmatch(path.name):
            with path.open("rb") as file:
                fault = describe_unfetched(file.read(1024))
            if fault is not None:
                return f"{path.name} {fault}"
    said = str(error).strip()
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in said:
        return "a pickle in it holds more than weights, and to open that could run any program"
    if isinstance(error, OSError):
        return said.splitlines()[0]
    return f"a file of its weights is damaged or has been cut short ({type(error).__name__}); fetch it again"


def _require_complete(loading: Mapping[str, Any], message: str) -> None:
    """Refuse a checkpoint that leaves weights at their random start, which the libraries' loaders only log."""
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading.get(kind) or ())
    if wrong or loading.get("error_msgs"):
        some = ", ".join(wrong[:3]) or str(loading["error_msgs"][0])
        raise UserError(f"{message}: {len(wrong)} would stay random ({some}, ...)")


def _folder_identity(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_file(path)}" for path in files]
    return "sha256:" + sha256_text("\n".join(lines))

"""Where a model's weights come from: a local folder or a hub id, through one code path."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.store.files import sha256_file, sha256_text

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ModelSource:
    """What to hand to `from_pretrained` (`location`, `revision`), and what goes into fingerprints (`identity`)."""

    location: str
    revision: str | None
    identity: str


def resolve_model(model_id: str, revision: str | None = None) -> ModelSource:
    """Find a model by local folder (relative to the working folder or the repository), or else by hub id.

    A folder's identity is a hash over the bytes of its files; a hub model's is `id@revision`.

    Raises:
        FileNotFoundError: `model_id` looks like a path and there is no such folder.
    """
    for root in (Path(), REPOSITORY):
        folder = root / model_id
        if folder.is_dir():
            return ModelSource(str(folder), None, _folder_identity(folder))
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise FileNotFoundError(f"model folder {model_id} does not exist")
    return ModelSource(model_id, revision, f"{model_id}@{revision or 'main'}")


def require_model(source: ModelSource, *, key: str) -> None:
    """Check that a hub model is in the local cache or can be fetched, before any work starts.

    Raises:
        ValueError: names the recipe `key`, the model and the way out, in one line.
    """
    if Path(source.location).is_dir():
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        snapshot_download(source.location, revision=source.revision, allow_patterns=["*.json"])
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        mode = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else type(error).__name__
        raise ValueError(
            f"{key} = {source.location!r} ({source.revision or 'main'}) is no local folder and not in the hub cache, "
            f"and cannot be downloaded ({mode}); give a local folder or run `hf download {source.location}`"
        ) from None


def _folder_identity(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_file(path)}" for path in files]
    return "sha256:" + sha256_text("\n".join(lines))

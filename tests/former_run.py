"""Directories as they were when fingerprints had every field written out, and config models with one key more."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.store.manifest import MANIFEST_NAME, Fingerprint


def as_formerly(directory: Path, defaults: Mapping[str, Any]) -> str:
    """Write `defaults` out in a finished directory's fingerprint, manifest and markers; returns the digest."""
    path = directory / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    former = Fingerprint.of({**defaults, **manifest["fingerprint"]["fields"]})
    manifest["fingerprint"] = {"fields": former.fields, "digest": former.digest}
    manifest["extra"].pop("defaults", None)
    path.write_text(json.dumps(manifest))
    for marker in (directory / ".done").glob("*.json"):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"fingerprint": former.digest}))
    return former.digest


def times_of(folder: Path) -> dict[Path, int]:
    """When each file was written, in nanoseconds; not the lock, which every command opens."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}

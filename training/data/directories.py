"""Feature directories, on a disk or behind a URL."""

import threading
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError
from pipelines.store.families import FamilySchema, schema_of
from pipelines.store.files import is_remote, open_binary
from pipelines.store.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from training.data.cache import ShardCache, ShardFile


@dataclass(frozen=True, kw_only=True)
class FeatureDirectory:
    """Shards of one family of features; `cache` is None for a local folder.

    `called` is what batches call the family, where not by its name: as one that is joined to another of its kind.
    """

    location: str
    manifest: Manifest
    cache: ShardCache | None = None
    called: str | None = None

    def __str__(self) -> str:
        return self.location

    @cached_property
    def family(self) -> FamilySchema:
        """What its members hold.

        Raises:
            UserError: its manifest is not one of features.
        """
        family = schema_of(self.manifest)
        if family is None:
            raise UserError(f"{self.location}/{MANIFEST_NAME} does not say which family of features it is of")
        return family if self.called is None else replace(family, name=self.called, leads=False)

    def fact(self, name: str) -> Any:
        """Return what the manifest says of `name`; raises as `Manifest.fact` does."""
        return self.manifest.fact(name, where=self.location)

    def url(self, name: str, suffix: str) -> str:
        """Return where a shard's file is."""
        return f"{self.location}/{name}{suffix}"

    def open(self, name: str, suffix: str, *, is_stopping: threading.Event | None = None) -> ShardFile:
        """Return a shard's file as a local one: itself, or its copy in the cache; raises as `ShardCache.open` does."""
        if self.cache is None:
            return ShardFile(Path(self.url(name, suffix)))
        sha256 = self.manifest.shards[name].files[suffix]
        return self.cache.open(self.url(name, suffix), sha256, is_stopping=is_stopping)

    def read_bytes(self, name: str) -> bytes:
        """Return a small file that no manifest lists."""
        with open_binary(f"{self.location}/{name}") as file:
            return file.read()


def open_directory(location: str, cache: ShardCache | None = None) -> FeatureDirectory:
    """Read the manifest of a feature directory; one behind a URL needs a `cache`.

    Raises:
        MissingFileError: it does not exist, or the stage that writes it has not finished.
        StorageError, UserError: the URL cannot be read, see `pipelines.store.remote`.
        UserError: the manifest is damaged, or of another schema version.
    """
    if not is_remote(location):
        return FeatureDirectory(location=location, manifest=read_manifest(Path(location)))
    assert cache is not None
    return FeatureDirectory(location=location, manifest=_read_manifest(location), cache=cache)


def _read_manifest(location: str) -> Manifest:
    url = f"{location}/{MANIFEST_NAME}"
    try:
        with open_binary(url) as file:
            data = file.read()
    except FileNotFoundError:
        raise MissingFileError(f"{url} does not exist: there are no finished features at {location}") from None
    return parse_manifest(data, where=url)

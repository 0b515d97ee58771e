"""What a process of the cache tests does; apart from them, so that it starts without torch."""

from pathlib import Path

from training.data.cache import ShardCache


def open_once(directory: str, url: str, sha256: str) -> bytes:
    with ShardCache(Path(directory), 10**6).open(url, sha256) as file:
        return file.path.read_bytes()

"""`python -m dataset_stats.tagging.nltk_data` (`make nltk-data`): install NLTK's tagger weights once, checksummed."""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence

from dataset_stats.tagging.taggers import NLTK_TAGGER, nltk_data_folders
from errors import StorageError, UserError
from pipelines.command import run_command
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_bytes

OFFICIAL_URL = f"https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/taggers/{NLTK_TAGGER}.zip"
TIMEOUT_SECONDS = 60
MAX_BYTES = 64 << 20
SHA256 = {
    "weights": "789e8e35f6fac656d9b7eccea29ba4e8a137cbb5b525dd31f39e4291a9e80832",
    "tagdict": "4c713731cb06727736962bc8cd94ad919217a040e76691059af99bc0c2c9c246",
    "classes": "7a87ba804751f4719b2d8e0e7693955761c579526b20a1b68ffc365b412e7f10",
}
log = get_logger("dataset_stats")


def main(argv: Sequence[str] | None = None) -> None:
    """Install the weights into the first folder NLTK searches, unless they are there already."""
    parser = argparse.ArgumentParser(prog="python -m dataset_stats.tagging.nltk_data", description=__doc__)
    parser.add_argument("--url", default=OFFICIAL_URL, help="a mirror of the zip file; checked like the official one")
    options = parser.parse_args(argv)
    folder = nltk_data_folders()[0] / "taggers" / NLTK_TAGGER
    files = {part: folder / f"{NLTK_TAGGER}.{part}.json" for part in SHA256}
    if all(path.is_file() and _sha256(path.read_bytes()) == SHA256[part] for part, path in files.items()):
        log.info(f"nothing to do: {folder} is complete")
        return
    archive = zipfile.ZipFile(io.BytesIO(_download(options.url)))
    contents = {part: archive.read(f"{NLTK_TAGGER}/{path.name}") for part, path in files.items()}
    for part, data in contents.items():
        if _sha256(data) != SHA256[part]:
            raise UserError(f"{options.url}: {files[part].name} has SHA-256 {_sha256(data)}, not {SHA256[part]}")
    for part, path in files.items():
        atomic_write_bytes(path, contents[part])
    log.info(f"installed {NLTK_TAGGER} in {folder}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            return response.read(MAX_BYTES)
    except urllib.error.URLError as error:
        raise StorageError(f"{url} cannot be fetched ({error.reason}); --url names a mirror") from None


if __name__ == "__main__":
    sys.exit(run_command("dataset_stats", main))

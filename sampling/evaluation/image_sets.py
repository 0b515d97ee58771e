"""Sets of images that features are taken of: a folder, raw shards, or a folder of samples with their prompts."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from errors import MissingFileError
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.raw.samples import IMAGE_EXTENSIONS
from pipelines.raw.shards import describe_shards, expand_shards, open_shard
from pipelines.store.files import atomic_write_bytes, sha256_file, sha256_text
from sampling.images import MEND

HASH_THREADS = 8

log = get_logger("evaluation")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images as sources for `run_over_shards`.

    Attributes:
        name: what the user called it.
        identity: hash of the images (and prompts), whatever their folder is called.
        dialect: of raw shards; empty for lists of files.
        mend: what to do about an image that cannot be used, where that is known.
    """

    name: str
    identity: str
    sources: list[Source]
    dialect: str = ""
    mend: str = ""

    @property
    def num_images(self) -> int:
        """Images in the set, unusable ones too."""
        return sum(source.num_samples for source in self.sources)


@dataclass(frozen=True, kw_only=True)
class SetImage:
    """One image's encoded bytes, or why there are none; `prompt` is what it should show, where that is known."""

    key: str
    data: bytes
    prompt: str | None = None
    reject: str | None = None


def open_reference(spec: str, *, run: Path, cache: Path) -> ImageSet:
    """Find the images of `evaluation.reference`: a folder of images, or shards by folder, pattern or URL.

    Raises:
        MissingFileError: there are none; names the key.
    """
    spec = spec.replace("{run}", str(run))
    folder = Path(spec).expanduser()
    if folder.is_dir() and not any(folder.glob("*.tar")):
        return open_folder(folder, cache=cache)
    try:
        paths = expand_shards(spec)
    except FileNotFoundError:
        raise MissingFileError(f"evaluation.reference {spec} is no folder of images, and no shard matches it") from None
    shards = describe_shards(paths, run=run)
    sources = [shard.source for shard in shards]
    identity = "sha256:" + sha256_text("\n".join(sorted(f"{source.name} {source.identity}" for source in sources)))
    return ImageSet(name=spec, identity=identity, sources=sources, dialect="auto")


def open_folder(folder: Path, *, cache: Path) -> ImageSet:
    """List the images below a folder by their extensions; other files are counted and left out.

    Raises:
        MissingFileError: there is no image.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lstrip(".").lower() in IMAGE_EXTENSIONS]
    if not images:
        raise MissingFileError(f"evaluation.reference {folder} holds no image (of {len(files)} files)")
    if len(images) < len(files):
        log.info(f"{folder}: {len(files) - len(images):,} files are no images by their names, and left out")
    rows = [{"key": path.relative_to(folder).as_posix(), "file": str(path.absolute())} for path in images]
    return _list_images(str(folder), rows, cache=cache)


def open_samples(folder: Path, *, cache: Path, has_prompts: bool = True) -> ImageSet:
    """Take the images of a finished folder of samples; a class label is no prompt, so classes come without.

    Raises:
        MissingFileError: sampling has not finished there.
    """
    table = folder / "samples.parquet"
    if not table.is_file():
        raise MissingFileError(f"{table} does not exist: the samples of {folder} have not been drawn")
    rows = [
        {"key": row["file"], "file": str((folder / row["file"]).absolute())}
        | ({"prompt": row["prompt"]} if has_prompts else {})
        for row in pq.read_table(table, columns=["file", "prompt"]).to_pylist()
    ]
    return _list_images(str(folder), rows, cache=cache, mend=MEND)


def _list_images(name: str, rows: Sequence[dict[str, str]], *, cache: Path, mend: str = "") -> ImageSet:
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = list(pool.map(lambda row: sha256_file(Path(row["file"])), rows))
    described = [[row["key"], row.get("prompt"), digest] for row, digest in zip(rows, hashes, strict=True)]
    identity = "sha256:" + sha256_text(json.dumps(described))
    path = cache / "lists" / f"{identity.removeprefix('sha256:')[:16]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    source = Source(name="images", path=str(path.absolute()), identity=identity, num_samples=len(rows))
    return ImageSet(name=name, identity=identity, sources=[source], mend=mend)


def read_images(source: Source, start: int, stop: int, *, dialect: str) -> Iterator[SetImage]:
    """Yield the images [start, stop) of a source; one that cannot be read comes with its reason."""
    if dialect:
        with open_shard(source.path, dialect) as shard:
            for sample in shard.samples[start:stop]:
                data = b"" if sample.reject else shard.image_bytes(sample)
                yield SetImage(key=f"{source.name}/{sample.key}", data=data, reject=sample.reject)
        return
    lines = Path(source.path).read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines[start:stop]):
        try:
            yield SetImage(key=row["key"], data=Path(row["file"]).read_bytes(), prompt=row.get("prompt"))
        except OSError:
            yield SetImage(key=row["key"], data=b"", prompt=row.get("prompt"), reject="unreadable_file")

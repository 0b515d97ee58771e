"""Sets of images that features are taken of: a folder, raw shards, or a folder of samples with their prompts."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command, typed_path
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject
from pipelines.raw.patterns import expand_shards
from pipelines.raw.reading import AS_IT_COMES, Reading
from pipelines.raw.samples import IMAGE_EXTENSIONS, RawSample
from pipelines.raw.shards import RawShard, describe_shards, open_shard
from pipelines.store.files import atomic_write_bytes, one_at_a_time, sha256_file, sha256_text
from pipelines.store.manifest import MARKER_FOLDER, read_manifest
from pipelines.store.png_files import require_sound_png
from pipelines.store.state_files import read_records
from pipelines.store.tables import MEND_SHARD, read_table, read_table_schema
from sampling.images import MEND

HASH_THREADS = 8
SAMPLES_SHARD = "samples"
SAMPLES_NAME = f"{SAMPLES_SHARD}.parquet"
# What sampling has always written of each sample.
SAMPLES_COLUMNS = {"number", "key", "prompt", "seed", "file"}
# Why a file of a folder is no image of the set.
NO_SAMPLE = "not one of its samples.parquet"
NO_IMAGE = "no image by its name"
HIDDEN = "hidden"
BESIDE_SHARDS = "beside the shards"

log = get_logger("evaluation")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images as sources for `run_over_shards`.

    Attributes:
        name: what the user called it.
        identity: hash of the images (and prompts), whatever their folder is called.
        reading: of raw shards; None for lists of files.
        left_out: files of the folder that are not in the set, by reason.
    """

    name: str
    identity: str
    sources: list[Source]
    reading: Reading | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Images in the set, unusable ones too."""
        return sum(source.num_samples for source in self.sources)

    def prompts(self) -> list[str]:
        """Return what the images should show, each prompt once; nothing for images without prompts."""
        rows = [] if self.reading else [row for source in self.sources for row in _rows(source)]
        return list(dict.fromkeys(row["prompt"] for row in rows if row.get("prompt") is not None))


@dataclass(frozen=True, kw_only=True)
class SetImage:
    """One image's encoded bytes, or why there are none; `prompt` is what it should show, where that is known."""

    key: str
    data: bytes
    prompt: str | None = None
    reject: str | None = None


def open_reference(spec: str, *, run: Path, cache: Path) -> ImageSet:
    """Find the images of `evaluation.reference`: a folder of images, or shards by folder, pattern or URL.

    Of a folder of samples it takes the samples alone: neither their grid nor what else somebody has put there.

    Raises:
        MissingFileError: there are none, or a sample is gone; names the key.
    """
    pattern, spec = spec, spec.replace("{run}", str(run))
    folder = typed_path(spec)
    if folder.is_dir() and not any(folder.glob("*.tar")) and not _has_rows_alone(folder):
        return open_folder(folder, cache=cache)
    try:
        paths = expand_shards(pattern, run=run)
    except MissingFileError:
        raise MissingFileError(f"evaluation.reference {spec} is no folder of images, and no shard matches it") from None
    shards = describe_shards(paths, run=run)
    sources = [shard.source for shard in shards]
    identity = "sha256:" + sha256_text("\n".join(sorted(f"{source.name} {source.identity}" for source in sources)))
    left_out = {}
    if folder.is_dir():
        shown = [path for path in _files(folder) if not _is_hidden(path, folder)]
        left_out = _say_left_out(folder, Counter(BESIDE_SHARDS for path in shown if _is_image(path)))
    return ImageSet(name=spec, identity=identity, sources=sources, reading=AS_IT_COMES, left_out=left_out)


def _has_rows_alone(folder: Path) -> bool:
    """Whether a folder is a data set of Parquet or Arrow files, without an image."""
    files = _files(folder)
    return not any(map(_is_image, files)) and any(path.suffix.lower() in (".parquet", ".arrow") for path in files)


def open_folder(folder: Path, *, cache: Path) -> ImageSet:
    """List the images below a folder by their extensions; in a folder of samples those of its table alone.

    Other files are counted by reason and left out.

    Raises:
        MissingFileError: there is no image, or a sample is gone.
    """
    files = _files(folder)
    shown = [path for path in files if not _is_hidden(path, folder)]
    tables = {path.parent for path in shown if path.name == SAMPLES_NAME and _is_of_samples(path.parent)}
    samples = {path for table in tables for path in _sample_files(table, mend=_mend_reference())}
    rows: list[dict[str, str]] = []
    left_out: Counter[str] = Counter({HIDDEN: len(files) - len(shown)})
    for path in shown:
        if path in samples:
            rows.append({"key": path.relative_to(folder).as_posix(), "file": str(path.absolute())})
        elif path.name == SAMPLES_NAME and path.parent in tables:
            continue
        elif not _is_image(path):
            left_out[NO_IMAGE] += 1
        elif tables & {path.parent, *path.parents}:
            left_out[NO_SAMPLE] += 1
        else:
            rows.append({"key": path.relative_to(folder).as_posix(), "file": str(path.absolute())})
    if not rows:
        raise MissingFileError(f"evaluation.reference {folder} holds no image (of {len(files)} files)")
    return _list_images(str(folder), rows, cache=cache, left_out=_say_left_out(folder, +left_out))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_image(path: Path) -> bool:
    return path.suffix.lstrip(".").lower() in IMAGE_EXTENSIONS


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether a name on the way to a file has a dot in front, as of thumbnails and notebooks' copies."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_of_samples(folder: Path) -> bool:
    """Whether a folder's table is what sampling writes, and not a user's own file of that name."""
    if (folder / MARKER_FOLDER / f"{SAMPLES_SHARD}.json").is_file():
        return True
    with contextlib.suppress(UserError):
        if {*read_table_schema(folder / SAMPLES_NAME, mend=_mend_reference()).names} >= SAMPLES_COLUMNS:
            return True
    with contextlib.suppress(UserError):
        return SAMPLES_SHARD in read_manifest(folder).shards
    return False


def _sample_files(folder: Path, *, mend: str) -> list[Path]:
    """Return the files that a folder's table of samples names.

    Raises:
        MissingFileError: one is gone.
        UserError: the table is damaged or names a file elsewhere, or a sample is cut or changed; names it.
    """
    table = folder / SAMPLES_NAME
    names = read_table(table, ["file"], mend=mend)["file"].to_pylist()
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{table} names {name!r}, which is no file of its own folder; {mend}")
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder / name} does not exist, but {table} names it: draw it again")
    paths = [folder / name for name in names]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        list(pool.map(lambda path: require_sound_png(path, mend=MEND), paths))
    return paths


def _say_left_out(folder: Path, reasons: Mapping[str, int]) -> dict[str, int]:
    if reasons:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        log.info(f"evaluation.reference {folder}: files left out: {counts}")
    return dict(sorted(reasons.items()))


def open_samples(folder: Path, *, cache: Path, has_prompts: bool = True) -> ImageSet:
    """Take the images of a finished folder of samples; a class label is no prompt, so classes come without.

    Raises:
        MissingFileError: sampling has not finished there, or a sample is gone.
        UserError: a sample is damaged; names it.
    """
    table = folder / SAMPLES_NAME
    if not table.is_file():
        raise MissingFileError(f"{table} does not exist: the samples of {folder} have not been drawn")
    _sample_files(folder, mend=MEND_SHARD)
    rows = [
        {"key": row["file"], "file": str((folder / row["file"]).absolute())}
        | ({"prompt": row["prompt"]} if has_prompts else {})
        for row in read_table(table, ["file", "prompt"], mend=MEND_SHARD).to_pylist()
    ]
    return _list_images(str(folder), rows, cache=cache)


def _list_images(
    name: str,
    rows: Sequence[dict[str, str]],
    *,
    cache: Path,
    left_out: Mapping[str, int] | None = None,
) -> ImageSet:
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = list(pool.map(lambda row: sha256_file(Path(row["file"])), rows))
    described = [[row["key"], row.get("prompt"), digest] for row, digest in zip(rows, hashes, strict=True)]
    identity = "sha256:" + sha256_text(json.dumps(described))
    path = cache / "lists" / f"{identity.removeprefix('sha256:')[:16]}.jsonl"
    with one_at_a_time(path.parent):
        atomic_write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    source = Source(name="images", path=str(path.absolute()), identity=identity, num_samples=len(rows))
    return ImageSet(name=name, identity=identity, sources=[source], left_out=left_out or {})


def _rows(source: Source) -> list[dict[str, str]]:
    """Return the rows of a list of files."""
    mend = "remove it and type the command again: that writes it anew"
    return read_records(Path(source.path), mend=mend, keys=("key", "file"))


def read_images(source: Source, start: int, stop: int, *, reading: Reading | None) -> Iterator[SetImage]:
    """Yield the images [start, stop) of a source; one that cannot be read comes with its reason."""
    if reading is not None:
        with open_shard(source.path, reading) as shard:
            for sample in shard.samples[start:stop]:
                yield _shard_image(shard, sample)
        return
    for row in _rows(source)[start:stop]:
        try:
            yield SetImage(key=row["key"], data=Path(row["file"]).read_bytes(), prompt=row.get("prompt"))
        except OSError:
            yield SetImage(key=row["key"], data=b"", prompt=row.get("prompt"), reject="unreadable_file")


def _shard_image(shard: RawShard, sample: RawSample) -> SetImage:
    key = f"{shard.name}/{sample.key}"
    if sample.reject is not None:
        return SetImage(key=key, data=b"", reject=sample.reject)
    try:
        return SetImage(key=key, data=shard.image_bytes(sample))
    except SampleReject as reject:
        return SetImage(key=key, data=b"", reject=reject.reason)


def _mend_reference() -> str:
    # It may be of another run, where nothing is to be removed on this one's word.
    return (
        f"`{typed_command('verify')}` of the run that drew it says how to mend it, or name another evaluation.reference"
    )

"""What raw shards are, and what is to be known of each before it is opened; what a run remembers is not read again."""

import functools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from pipelines.engine.progress import progress_bar
from pipelines.raw.kinds.folder_shards import is_local_folder, read_folder
from pipelines.raw.kinds.local_files import list_folder
from pipelines.raw.kinds.row_shards import images_in, read_row_headers
from pipelines.raw.kinds.table_shards import are_files_as_known, read_table_headers
from pipelines.raw.kinds.tar_shards import read_tar_headers
from pipelines.raw.reading import Reading, UnreadableShardError
from pipelines.raw.samples import IMAGE_EXTENSIONS
from pipelines.raw.shard_headers import FOLDER, HeaderCache, RecentHeaders, ShardHeaders, ShardSummary
from pipelines.raw.tables.arrow_tables import ARROW_FILE
from pipelines.raw.tables.open_table import ARROW_STREAM, PARQUET, table_format
from pipelines.raw.tasks import NUM_REMOTE_THREADS, NUM_THREADS, cut_into_tasks, map_tasks
from pipelines.store.files import RangeFile, is_remote, open_ranges

# Headers of remote shards are waited for, those of local ones computed: threads for the one, processes for the other.
SHARDS_PER_TASK = 16
TASKS_PER_THREAD = 4
MIN_SHARDS_PER_PROCESS = 64
# Their threads have as many requests under way as a prefix of S3 answers in a tenth of a second.
MAX_REMOTE_PROCESSES = 4
MIN_BYTES_PER_PROCESS = 1 << 30
SHARDS_WEIGHED = 64
# Headers of so few samples are read as fast as what a file remembers of them: it is kept in memory alone.
FEW_SAMPLES = 16
RECENT = RecentHeaders()
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")


def read_headers(path: str, file: RangeFile | None, reading: Reading) -> ShardHeaders:
    """Look at a shard: a folder, without `file`; else by its first bytes Parquet or Arrow, by name a table, or a tar.

    Raises:
        UnreadableShardError: it is none of them, or cannot be read by place; names it.
        UserError, StorageError: it is damaged, out of reach, or its columns are not told apart; names it.
    """
    if file is None:
        return read_folder(path.removeprefix("file://"), reading)
    start = file.read(0, 16)
    if start.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        column = images_in(path, file, reading)
        if column is not None:
            return read_row_headers(path, file, column, reading)
        return read_table_headers(path, file, reading)
    if start.startswith(PICTURE_STARTS) or path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
        raise UnreadableShardError(f"{path} is an image: name the folder that it is in")
    if table_format(path) is not None and not path.lower().endswith(".tar"):
        return read_table_headers(path, file, reading)
    return read_tar_headers(path, file)


def recall_or_read_headers(
    path: str, file: RangeFile | None, reading: Reading, *, run: Path | None, identity: str | None
) -> ShardHeaders:
    """Return what is remembered of a shard in `run`, or look at it; see `recall_headers`, raises as `read_headers`."""
    if run is None:
        return read_headers(path, file, reading)
    recent = RECENT.headers(path)
    if file is not None and recent is not None and recent.summary.is_of(file.stamp, reading):
        return recent
    cache = HeaderCache(run)
    headers = recall_headers(path, file, reading, cache=cache, identity=identity)
    if headers is None:
        headers = read_headers(path, file, reading)
        if cache.has_forgotten:
            cache.remember(path, headers)
    return headers


def recall_headers(
    path: str, file: RangeFile | None, reading: Reading, *, cache: HeaderCache, identity: str | None = None
) -> ShardHeaders | None:
    """Return what a file remembers of a shard, if it is as it was, or else None.

    Where files of a folder or table are to be those of a known `identity`, each is looked at when it is read.
    """
    headers = cache.headers(path)
    if headers is None:
        return None
    summary = headers.summary
    if file is None:
        is_known = summary.identity == identity and summary.is_of(summary.stamp, reading)
        return headers if is_known or summary.is_of(stamp_of(path), reading) else None
    if not summary.is_of(file.stamp, reading):
        return None
    is_known = summary.kind != "table" or summary.identity == identity
    return headers if is_known or are_files_as_known(path, headers) else None


def stamp_of(path: str) -> str | None:
    """Return what changes when a file, or a file of a folder, does; None where that cannot be known."""
    if is_local_folder(path):
        return list_folder(path.removeprefix("file://")).stamp
    with open_ranges(path) as file:
        return file.stamp


def read_summaries(
    paths: Sequence[str], reading: Reading, *, run: Path | None
) -> list[ShardSummary | UnreadableShardError]:
    """Return what is to be known of each shard, or what is wrong with it; what was not remembered in `run` is read.

    Raises:
        UserError, StorageError: a shard cannot be read; names it.
    """
    found: dict[str, ShardSummary | None] = dict.fromkeys(paths)
    if run is not None and (run / FOLDER).is_dir():
        recall = functools.partial(_recall_summary, reading=reading, run=run)
        with ThreadPoolExecutor(_num_threads(paths)) as pool:
            found = dict(zip(paths, pool.map(recall, paths), strict=True))
    unread = [path for path, summary in found.items() if summary is None]
    num_processes = _num_processes(unread)
    tasks = cut_into_tasks(unread, _num_in_task(unread, num_processes))
    read: dict[str, ShardSummary | UnreadableShardError] = {}
    with progress_bar("shards", len(unread), unit="shards") as progress:
        for task, summaries in zip(tasks, _run_tasks(tasks, reading, run, num_processes), strict=True):
            read.update(zip(task, summaries, strict=True))
            progress.advance(len(task), note="reading headers")
    return [summary or read[path] for path, summary in found.items()]


def _num_threads(paths: Sequence[str]) -> int:
    return NUM_REMOTE_THREADS if any(map(is_remote, paths)) else NUM_THREADS


def _num_in_task(paths: Sequence[str], num_processes: int) -> int:
    if any(map(is_remote, paths)):  # the threads of a process share a task
        return 1 if num_processes < 2 else min(2 * NUM_REMOTE_THREADS, -(-len(paths) // num_processes))
    return max(1, min(SHARDS_PER_TASK, len(paths) // (TASKS_PER_THREAD * NUM_THREADS)))


def _run_tasks(
    tasks: Sequence[Sequence[str]], reading: Reading, run: Path | None, num_processes: int
) -> Iterator[list[ShardSummary | UnreadableShardError]]:
    read = functools.partial(_read_some, reading=reading, run=run)
    if num_processes < 2 and any(is_remote(path) for task in tasks for path in task):
        with ThreadPoolExecutor(NUM_REMOTE_THREADS) as pool:
            yield from pool.map(read, tasks)
        return
    if num_processes < 2:
        yield from map_tasks(read, tasks)
        return
    # Not by fork: the threads of fsspec and Arrow would be missing in the child, and their locks held.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(functools.partial(_read_in_threads, reading=reading, run=run), tasks)


def _num_processes(paths: Sequence[str]) -> int:
    """Return how many processes look at shards: one starts in the time in which a gigabyte of tars is looked at."""
    num_processes = min(os.cpu_count() or 1, len(paths) // MIN_SHARDS_PER_PROCESS)
    if any(map(is_remote, paths)):
        return min(num_processes, MAX_REMOTE_PROCESSES)
    if num_processes < 2:
        return num_processes
    some = paths[:: -(-len(paths) // SHARDS_WEIGHED)]
    num_bytes = sum(Path(path.removeprefix("file://")).stat().st_size for path in some) * len(paths) // len(some)
    return min(num_processes, num_bytes // MIN_BYTES_PER_PROCESS)


def _read_in_threads(
    paths: Sequence[str], *, reading: Reading, run: Path | None
) -> list[ShardSummary | UnreadableShardError]:
    with ThreadPoolExecutor(min(_num_threads(paths), len(paths))) as pool:
        return list(pool.map(functools.partial(_read_summary, reading=reading, run=run), paths))


def _read_some(
    paths: Sequence[str], *, reading: Reading, run: Path | None
) -> list[ShardSummary | UnreadableShardError]:
    return [_read_summary(path, reading=reading, run=run) for path in paths]


def _recall_summary(path: str, *, reading: Reading, run: Path) -> ShardSummary | None:
    cache = HeaderCache(run)
    summary = cache.summary(path)
    if summary is None or not summary.is_of(stamp_of(path), reading):
        return None
    if summary.kind == "table":
        headers = cache.headers(path)
        return summary if headers is not None and are_files_as_known(path, headers) else None
    return summary


def _read_summary(path: str, *, reading: Reading, run: Path | None) -> ShardSummary | UnreadableShardError:
    try:
        if is_local_folder(path):
            headers = read_headers(path, None, reading)
        else:
            with open_ranges(path) as file:
                headers = read_headers(path, file, reading)
    except UnreadableShardError as error:
        return error
    if run is not None:
        if headers.summary.num_samples > FEW_SAMPLES or is_remote(path):
            HeaderCache(run).remember(path, headers)
        elif headers.summary.kind in ("tar", "rows"):
            RECENT.remember(path, headers)
    return headers.summary

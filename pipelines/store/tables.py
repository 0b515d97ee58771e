"""The house's own Parquet tables, read in one way: a damaged one is named, with what to do about it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from errors import MissingFileError, UserError

# Of the files of a finished shard, and of a part of one: what is not there is done again.
MEND_SHARD = "remove it and type the command that makes it again: this shard alone is done anew"
MEND_PART = "remove it and type the command again: these samples alone are done anew"
MEND_USERS = "fetch or write it again"  # of a file that a user has brought


@contextlib.contextmanager
def sound_table(path: Path | str, *, mend: str) -> Iterator[None]:
    """Around code that reads the Parquet file at `path`, in whatever way; `mend` says what to do when it is damaged.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is cut short, is no Parquet, or lacks a column that is read; names the file.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist; {mend}") from None
    except (pa.ArrowException, OSError) as error:
        # Arrow says of damaged pages that they are an OSError, but without the number of one.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is no readable table ({reason}); {mend}") from None


def read_table(path: Path, columns: Sequence[str] | None = None, *, mend: str) -> pa.Table:
    """Return a table that the house has written, or some columns of it; raises as `sound_table` does."""
    with sound_table(path, mend=mend):
        table = pq.read_table(path, columns=None if columns is None else list(columns))
    if missing := sorted(set(columns or ()) - set(table.column_names)):
        raise UserError(f"{path} lacks the column {missing[0]!r}; {mend}")
    return table


def read_table_schema(path: Path, *, mend: str) -> pa.Schema:
    """Return the schema of a table that the house has written; raises as `sound_table` does."""
    with sound_table(path, mend=mend):
        return pq.read_schema(path)


def count_table_rows(path: Path, *, mend: str) -> int:
    """Return the number of rows of a table that the house has written; raises as `sound_table` does."""
    with sound_table(path, mend=mend):
        return pq.read_metadata(path).num_rows

"""Objects of S3 through obstore, whose requests cost a tenth of what they cost through s3fs.

What `FSSPEC_S3_…`, `AWS_…` and the files of `~/.aws` say counts as it does for s3fs: the address, the region and the
credentials are asked of its client. A bucket that obstore cannot read as s3fs does, or with settings that it has not
in the same sense, is read through s3fs.
"""

import functools
import importlib.util
import os
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync

from pipelines.engine.progress import get_logger

PROTOCOLS = ("s3", "s3a")
# Settings of s3fs that obstore has in the same sense, or that are about waiting alone.
CLIENT_SETTINGS = {
    *("endpoint_url", "region_name", "use_ssl"),
    *("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
}
CONFIG_SETTINGS = {"connect_timeout", "read_timeout", "retries", "max_pool_connections"}
# Files of certificates, as botocore is told of them.
CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
# obstore has rules of its own for other keys: for empty steps, `..`, and what is percent-encoded.
PLAIN_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]*")
PLAIN_KEY = re.compile(r"(?!(?:.*/)?\.{1,2}(?:/|$))[\w!.*'()=+@,:-]+(?:/[\w!.*'()=+@,:-]+)*", re.ASCII)
AMAZON = re.compile(r"(?:.*\.)?amazonaws\.com(?:\.cn)?")
# botocore renews credentials ten minutes before they expire.
CREDENTIALS_LAST = timedelta(minutes=5)
# As s3fs waits: for bytes to come, however many there are.
CLIENT_OPTIONS: dict[str, Any] = {"connect_timeout": "5s", "read_timeout": "15s", "timeout": "1h"}
MAX_FAILURES = 3  # of a bucket of which nothing has been read yet

log = get_logger("storage")


class _State:
    """What this process has: its buckets, by file system and name, and whether it is a fork of one that used obstore.

    obstore's threads are missing in a fork.
    """

    def __init__(self) -> None:
        self.buckets: dict[tuple[fsspec.AbstractFileSystem, str], _Bucket | None] = {}
        self.lock = threading.Lock()
        self.is_forked = False

    def after_fork(self) -> None:
        """Take note that this is the child of a fork."""
        self.is_forked = self.is_forked or any(bucket is not None for bucket in self.buckets.values())
        self.buckets, self.lock = {}, threading.Lock()


STATE = _State()
os.register_at_fork(after_in_child=STATE.after_fork)


class StoredObject:
    """An object as it was when it was opened.

    Attributes:
        size: in bytes.
        version: its ETag, or None.
    """

    def __init__(self, store: Any, key: str) -> None:
        """Ask for the object's size.

        Raises:
            FileNotFoundError: there is none.
            obstore.exceptions.BaseError: it is out of reach.
        """
        self._store, self._key = store, key
        facts = store.head(key)
        self.size = int(facts["size"])
        self.version: str | None = facts.get("e_tag")

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; raises as the constructor does."""
        return bytes(self._store.get_range(self._key, start=offset, end=offset + size))


def open_object(file_system: fsspec.AbstractFileSystem, path: str) -> StoredObject | None:
    """Open an object of S3; None where the file system itself is to read it.

    Raises:
        FileNotFoundError: there is none, in a bucket that has been read.
        obstore.exceptions.BaseError: it is out of reach, in a bucket that has been read.
    """
    name, _, key = path.partition("/")
    if not PLAIN_BUCKET.fullmatch(name) or not PLAIN_KEY.fullmatch(key):
        return None
    bucket = _find_bucket(file_system, name)
    return None if bucket is None else bucket.open(key)


class _Bucket:
    """A bucket that obstore may read, known for good when it has read of it."""

    def __init__(self, name: str, store: Any) -> None:
        self._name, self._store = name, store
        self._is_proven = False
        self._num_failures = 0

    def open(self, key: str) -> StoredObject | None:
        """Open an object as `open_object` does."""
        if self._num_failures >= MAX_FAILURES:
            return None
        try:
            found = StoredObject(self._store, key)
        except FileNotFoundError:
            if self._is_proven:
                raise
            return None
        except Exception as error:
            if self._is_proven:
                raise
            self._num_failures += 1
            if self._num_failures == MAX_FAILURES:
                log.info(f"s3://{self._name} is read through s3fs: obstore says {first_line(error)}")
            return None
        self._is_proven = True
        return found


def first_line(error: BaseException) -> str:
    """Return what an error says without the inner errors that obstore lists below."""
    return str(error).partition("\n")[0].strip()


def _find_bucket(file_system: Any, name: str) -> _Bucket | None:
    if STATE.is_forked or not _is_readable(file_system):
        return None
    with STATE.lock:
        if (file_system, name) not in STATE.buckets:
            settings = _store_settings(file_system, name)
            STATE.buckets[file_system, name] = None if settings is None else _Bucket(name, _open_store(settings))
        return STATE.buckets[file_system, name]


@functools.cache
def _has_obstore() -> bool:
    return importlib.util.find_spec("obstore") is not None


def _is_readable(file_system: Any) -> bool:
    """Whether it is s3fs, with nothing set that obstore does not have in the same sense."""
    protocols = (file_system.protocol,) if isinstance(file_system.protocol, str) else file_system.protocol
    if type(file_system).__module__ != "s3fs.core" or not set(protocols) & set(PROTOCOLS) or not _has_obstore():
        return False
    has_more = file_system.requester_pays or file_system.version_aware or file_system.s3_additional_kwargs
    has_more = has_more or set(file_system.client_kwargs) - CLIENT_SETTINGS
    has_more = has_more or set(file_system.config_kwargs) - CONFIG_SETTINGS
    return not has_more


def _store_settings(file_system: Any, bucket: str) -> dict[str, Any] | None:
    """Return what obstore needs to read a bucket as s3fs does; None where it cannot be told."""
    client = file_system.s3
    styles: Mapping[str, Any] = client.meta.config.s3 or {}
    if set(styles) - {"addressing_style"} or styles.get("addressing_style", "auto") not in ("auto", "path"):
        return None
    settings: dict[str, Any] = {"bucket": bucket, "client_options": CLIENT_OPTIONS, "retry_config": {"max_retries": 0}}
    address = urlsplit(client.meta.endpoint_url)
    if address.scheme == "https" and (file := next(filter(None, map(os.environ.get, CERTIFICATES)), None)):
        if not Path(file).is_file():
            return None
        settings["client_options"] = {**CLIENT_OPTIONS, "root_certificate": Path(file).read_bytes()}
    if AMAZON.fullmatch(address.hostname or ""):
        region = _region_of(file_system, bucket)
        if region is None:
            return None
        settings["region"] = region
    else:
        region = client.meta.region_name
        settings |= {"endpoint": client.meta.endpoint_url, "region": region if region != "aws-global" else None}
        settings["region"] = settings["region"] or "us-east-1"
        settings["client_options"] = {**settings["client_options"], "allow_http": address.scheme == "http"}
    if file_system.anon:
        return {**settings, "skip_signature": True}
    provider = functools.partial(_credentials, file_system)
    return None if provider() is None else {**settings, "credential_provider": provider}


def _region_of(file_system: Any, bucket: str) -> str | None:
    """Return the region of one of Amazon's buckets, which says it to those, too, who may not list it."""
    from botocore.exceptions import BotoCoreError, ClientError

    answer: Any
    try:
        answer = sync(file_system.loop, file_system.s3.head_bucket, Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError:  # s3fs will say what it is
        return None
    return answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")


def _credentials(file_system: Any) -> dict[str, Any] | None:
    """Return the credentials that s3fs signs with, as obstore takes them; None if there are none."""
    given = file_system.client_kwargs
    key = file_system.key or given.get("aws_access_key_id")
    if key:
        secret = file_system.secret or given.get("aws_secret_access_key")
        token = file_system.token or given.get("aws_session_token")
        return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}
    found = sync(file_system.loop, _session_credentials, file_system.session)
    if found is None:
        return None
    expires_at = datetime.now(UTC) + CREDENTIALS_LAST
    return {
        "access_key_id": found.access_key,
        "secret_access_key": found.secret_key,
        "token": found.token,
        "expires_at": expires_at,
    }


async def _session_credentials(session: Any) -> Any:
    credentials = await session.get_credentials()
    return None if credentials is None else await credentials.get_frozen_credentials()


def _open_store(settings: Mapping[str, Any]) -> Any:
    from obstore.store import S3Store

    return S3Store(**settings)

"""Files from the network to the disk: resumed where they were cut off, compared with their hash, renamed at the end.

What has come so far lies in ``NAME.part``, and in ``NAME.part.json`` what the server said of its version (RFC 9110,
If-Range), so that two versions of a file are never joined.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

import httpx

from hypersam.errors import CheckpointError, EmptyCheckpoint, FetchError, NotACheckpoint, StoreFull, WrongHash

_TIMEOUT = httpx.Timeout(60, connect=20)
_TRIES = 5
_PATIENCE = 1.0
"""Seconds before the second try; twice as many before each that follows without a byte in between."""
_LONGEST_PAUSE = 120.0
"""Seconds that a busy server may ask to be waited for; who asks for more is not asked again."""
_BUSY = (429, 500, 502, 503, 504)
"""Answers that another try may change."""

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Fetched:
    """A file that is there. ``received``: bytes that came over the network, 0 where it was there already;
    ``verified``: whether its hash was known beforehand; ``checked``: by what it is known to be whole: ``sha256``,
    ``size`` (it is the one that the server told), or ``content`` (it reads as a whole checkpoint)."""

    path: Path
    bytes: int
    sha256: str
    received: int
    verified: bool
    checked: Literal["sha256", "size", "content"]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"path": str(self.path)}


def fetch(
    url: str, target: Path, *, sha256: str | None = None, progress: Progress | None = None, patience: float = _PATIENCE
) -> Fetched:
    """Download ``url`` to ``target``, which appears only when it is complete and its hash, where given, is right.

    A connection that breaks is taken up again, and a busy server asked again, when it says so; when several tries in a
    row bring nothing the part stays, and the next call goes on from it. Where neither the hash nor the size is known
    the file must read as a whole checkpoint. ``progress`` is told the bytes there and in all (None where the server
    does not say). ``patience``: seconds before the second try. Raises FetchError, WrongHash, StoreFull, or OSError for
    a folder that cannot be written.
    """
    if target.exists():
        return _already_there(target, sha256)
    part = target.with_name(target.name + ".part")
    with _held(part) as file:
        came = _complete(url, file, _Version(part), sha256 is not None, progress or (lambda *_: None), patience)
        found = _sha256(part)
        if sha256 is not None and found != sha256:
            _Version(part).forget()
            part.unlink()
            raise WrongHash(f"{url} has the sha256 {found}, not {sha256}; what came was deleted")
        size = part.stat().st_size
        part.replace(target)
        _Version(part).forget()
    checked: Literal["sha256", "size", "content"] = "sha256" if sha256 else "size" if came.size_told else "content"
    return Fetched(target, size, found, came.received, sha256 is not None, checked)


def _already_there(target: Path, sha256: str | None) -> Fetched:
    if not target.is_file():
        raise FetchError(f"{target} is there and is no file; give another name")
    if sha256 is None:
        raise FetchError(f"{target} is there already, and no hash is known to tell whether it is the same; remove it")
    found = _sha256(target)
    if found != sha256:
        raise WrongHash(f"{target} is there already with the sha256 {found}, not {sha256}; remove it")
    return Fetched(target, target.stat().st_size, found, 0, True, "sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _held(part: Path) -> Iterator[BinaryIO]:
    """The part, open to be added to, by one process at a time."""
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FetchError(f"{part.name} is being downloaded by another process") from None
        try:
            yield file
        finally:
            if file.seek(0, 2) == 0:
                part.unlink(missing_ok=True)


class _Version:
    """What the server said of the version of which a part is, kept beside the part."""

    def __init__(self, part: Path) -> None:
        self._file = part.with_name(part.name + ".json")

    def of(self, url: str) -> str | None:
        """The validator for If-Range; None where nothing is known of this address."""
        try:
            kept = json.loads(self._file.read_text())
            return str(kept["validator"]) if kept["url"] == url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, url: str, response: httpx.Response) -> None:
        """A strong ETag, else the date of the last change."""
        etag = response.headers.get("etag", "")
        validator = etag if etag and not etag.startswith("W/") else response.headers.get("last-modified")
        if validator is None:
            self.forget()
        else:
            self._file.write_text(json.dumps({"url": url, "validator": validator}))

    def forget(self) -> None:
        self._file.unlink(missing_ok=True)


@dataclass
class _Came:
    """What has come: bytes, over all tries, and whether the last answer told how many the file has."""

    received: int = 0
    size_told: bool = False


class _Busy(Exception):
    """The server wants to be asked again, after ``pause`` seconds."""

    def __init__(self, answer: str, pause: float) -> None:
        super().__init__(answer)
        self.pause = pause


def _complete(
    url: str, file: BinaryIO, version: _Version, hash_known: bool, progress: Progress, patience: float
) -> _Came:
    """Fill the part."""
    came, tries = _Came(), 0
    farthest = file.tell()
    with httpx.Client(follow_redirects=True, timeout=_TIMEOUT, headers={"Accept-Encoding": "identity"}) as client:
        while True:
            try:
                _stream(client, url, file, version, hash_known, progress, came)
                file.flush()
                if not came.size_told and not hash_known and (damage := _damage(Path(file.name))):
                    raise httpx.RemoteProtocolError(f"the server told no size, and what came is not whole: {damage}")
                return came
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise FetchError(f"{url!r} is no http or https address: {error}") from error
            except (httpx.TransportError, httpx.TooManyRedirects, _Busy) as error:
                file.flush()
                # Only what was never there before counts: a server that always starts anew must not be asked for ever.
                tries = 1 if file.tell() > farthest else tries + 1
                farthest = max(farthest, file.tell())
                asked = error.pause if isinstance(error, _Busy) else 0.0
                if tries >= _TRIES or asked > _LONGEST_PAUSE:
                    raise FetchError(
                        f"{url} cannot be had: {error or type(error).__name__}; "
                        f"{file.tell()} bytes are kept, and the next call goes on from them"
                    ) from error
                time.sleep(max(asked, patience * 2 ** (tries - 1)))


def _damage(part: Path) -> str | None:
    """Why a file is no whole checkpoint; None for a whole one, even where it holds what is not read."""
    from hypersam.checkpoint import read_checkpoint  # brings torch, which a file of known hash or size does not need

    try:
        read_checkpoint(part, name=part.name.removesuffix(".part"))
    except (NotACheckpoint, EmptyCheckpoint) as error:
        return str(error)
    except CheckpointError:
        return None
    return None


def _stream(
    client: httpx.Client, url: str, file: BinaryIO, version: _Version, hash_known: bool, progress: Progress, came: _Came
) -> None:
    """One request: append what comes, or start anew where the server does so."""
    offset = file.seek(0, 2)
    validator = version.of(url)
    if offset and validator is None and not hash_known:
        offset = file.truncate(0)  # nothing would tell a mixture of two versions
    asked = {"Range": f"bytes={offset}-"} if offset else {}
    if offset and validator:
        asked["If-Range"] = validator
    with client.stream("GET", url, headers=asked) as response:
        if httpx.URL(url).scheme == "https" and response.url.scheme != "https":
            raise FetchError(f"{url} leads to {response.url}, which is not encrypted")
        if response.status_code == 416 and offset:
            if _total(response) != offset:
                file.truncate(0)
                raise httpx.RemoteProtocolError("the server has another file now")
            came.size_told = True
            return
        start, total = _answered(url, response, offset)
        came.size_told = total is not None
        if start != offset:
            file.truncate(start)
        version.keep(url, response)
        folder = Path(file.name).absolute().parent
        if total is not None and shutil.disk_usage(folder).free < total - start:
            raise StoreFull(f"{folder} has no room for the {total - start} bytes that are missing")
        done = start
        progress(done, total)
        for block in response.iter_raw():
            file.write(block)
            done += len(block)
            progress(done, total)
            came.received += len(block)
        if total is not None and done != total:
            raise httpx.RemoteProtocolError(f"{done} bytes came of {total}")


def _answered(url: str, response: httpx.Response, offset: int) -> tuple[int, int | None]:
    """Where the answer begins in the file, and the file's size where it is told."""
    if response.status_code == 206:
        unit, _, rest = response.headers.get("content-range", "").partition(" ")
        first = rest.partition("-")[0]
        if unit != "bytes" or first != str(offset):
            raise FetchError(f"{url} answers with another part ({rest!r}) than was asked for (from byte {offset})")
        return offset, _total(response)
    if response.status_code == 200 and response.headers.get("content-type", "").startswith("text/html"):
        raise FetchError(f"{url} answers with a web page, not with a file")
    if response.status_code == 200:
        length = response.headers.get("content-length", "")
        return 0, int(length) if length.isdecimal() else None
    answer = f"{response.status_code} {response.reason_phrase}".rstrip()
    if response.status_code in _BUSY:
        pause = _asked_pause(response)
        raise _Busy(f"it answers {answer}" + (f" and asks to be left alone for {pause:.0f} s" if pause else ""), pause)
    raise FetchError(f"{url} answers {answer}")


def _asked_pause(response: httpx.Response) -> float:
    """Seconds of Retry-After (RFC 9110), which gives a number of them or a date; 0 where nothing can be read."""
    said = response.headers.get("retry-after", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        until = parsedate_to_datetime(said)
        return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


def _total(response: httpx.Response) -> int | None:
    size = response.headers.get("content-range", "").rpartition("/")[2]
    return int(size) if size.isdecimal() else None

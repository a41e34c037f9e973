"""Downloads a file of weights whose SHA-256 is known, for `jaxtrain weights fetch`."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtrain.errors import WeightsError
from jaxtrain.host.files import sync_directory, writing

MOST_BYTES = 8 << 30
MOST_REDIRECTS = 5
_CHUNK = 1 << 20
_SECONDS = 60.0  # that the server may be silent
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MOST_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_url(url: str) -> None:
    """Raises `WeightsError` unless `url` is https, or http to this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise WeightsError(f"{url!r} is no URL ({error}).") from None
    if not host or (parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK)):
        raise WeightsError(f"{url!r} is not read: weights are fetched by https only.")


def fetch(
    url: str,
    sha256: str,
    out: Path,
    *,
    most_bytes: int = MOST_BYTES,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Downloads `url` to `out`, which is there only once its SHA-256 fits.

    What comes is written beside `out`, and removed where the download fails. The next call begins anew.

    Args:
      url: https.
      sha256: that the file must have, as hex.
      out: the file.
      most_bytes: more are refused.
      progress: called with the bytes so far and in all; 0 is not known.

    Raises:
      WeightsError: it cannot be fetched, is too large, or is another file. WorkdirError: it cannot be written.
    """
    check_url(url)
    if out.exists():
        if _digest(out) == sha256.lower():
            return out
        raise WeightsError(
            f"{out} is there and has another SHA-256 than {sha256}; move it away, or choose another --out."
        )
    part = out.with_name(f".{out.name}.part")
    try:
        with writing(out), _opened(part) as file:
            found = _download(url, file, most_bytes, progress)
        if found != sha256.lower():
            raise WeightsError(f"{url} has the SHA-256 {found}, not {sha256}; nothing was kept.")
        with writing(out):
            os.replace(part, out)
            sync_directory(out.parent)
    except _NetworkError as error:
        raise WeightsError(
            f"{url} cannot be fetched ({error}); without a network, fetch it elsewhere and put it at {out}; it must have the "
            f"SHA-256 {sha256.lower()}."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return out


class _NetworkError(Exception):
    """What the network has failed with; an `OSError` would be taken for one of the disk."""


@contextlib.contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(error.reason if type(error) is urllib.error.URLError else error) from None


def _opened(part: Path) -> Any:
    part.unlink(missing_ok=True)
    return open(part, "xb")


def _download(url: str, file: Any, most_bytes: int, progress: Callable[[int, int], None]) -> str:
    """Writes what `url` has, synced. Returns its SHA-256."""
    opener = urllib.request.build_opener(_Redirects)
    request = urllib.request.Request(url, headers={"User-Agent": "jaxtrain", "Accept-Encoding": "identity"})
    digest, done = hashlib.sha256(), 0
    with _network():
        answer = opener.open(request, timeout=_SECONDS)
    with contextlib.closing(answer):
        announced = answer.headers.get("Content-Length", "")
        size = int(announced) if announced.isdecimal() else 0
        while True:
            if max(done, size) > most_bytes:
                raise WeightsError(f"{url} has more than {most_bytes:,} bytes, which is more than --max-bytes allows.")
            with _network():
                chunk = answer.read(_CHUNK)
            if not chunk:
                break
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(done, size)
    if size and done < size:
        raise _NetworkError(f"it ended after {done:,} of {size:,} bytes")
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with writing(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

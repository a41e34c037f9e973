"""The token that opens the dashboard: one for each user of a host, in a file that nobody else can read."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from jaxtrain.errors import ConfigError
from jaxtrain.host.folder import reason
from jaxtrain.host.paths import home

_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


def default_folder() -> Path:
    """Where the token is kept: `$JAXTRAIN_STATE_DIR`/dashboard, or below the home directory."""
    named = os.environ.get("JAXTRAIN_STATE_DIR")
    return (Path(named) if named else home("JAXTRAIN_STATE_DIR") / ".local/state/jaxtrain") / "dashboard"


def user_token(folder: Path) -> str:
    """The token in `folder`/token, made where there is none. Raises `ConfigError` where others could read it."""
    path = folder / "token"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(folder, os.stat(folder, follow_symlinks=False), stat.S_ISDIR)
        if not os.path.lexists(path):
            _write(path)
        return _read(path)
    except OSError as error:
        raise ConfigError(f"{path}, the dashboard's token, cannot be read or written ({reason(error)}).") from None


def _write(path: Path) -> None:
    """Makes the file, whole; of two programs that do so at once, the token of the first stays."""
    part = path.with_name(f".token.{secrets.token_hex(8)}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32))
    with contextlib.suppress(FileExistsError):
        os.link(part, path)
    part.unlink()


def _read(path: Path) -> str:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        _require_private(path, os.fstat(file.fileno()), stat.S_ISREG)
        token = file.read(100).strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{path} holds no token; remove it, and the next start makes another.")
    return token


def _require_private(path: Path, found: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{path} could be read by others, and the dashboard's token is secret; chmod go= {path}, or remove it."
        )

"""Leaves secrets out of what is stored and shown: values whose name looks secret, and logins in addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SECRET = re.compile(r"token|secret|passw|key|credential", re.IGNORECASE)
_URL_USER = re.compile(r"(?<=://)[^/\s]+(?=@)")  # up to the last @: a password may hold one
HIDDEN = "[redacted]"


def is_secret(name: str) -> bool:
    """Whether what has this name may be a secret."""
    return bool(_SECRET.search(name))


def without_logins(text: str) -> str:
    """`text` without the user and password of the addresses in it (`https://user:password@host`)."""
    return _URL_USER.sub(HIDDEN, text)


def redact(argv: Sequence[str]) -> list[str]:
    """The command line without values whose name looks secret: `--api_key=x`, `--token x`, `user:x@host`."""
    shown: list[str] = []
    hide_next = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        flag = argument.startswith("-")
        if hide_next and not flag:
            shown.append(HIDDEN)
        elif equals and is_secret(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(without_logins(argument))
        hide_next = flag and not equals and is_secret(name)
    return shown


def redact_values(value: Any) -> Any:
    """A value of JSON without secrets: what a secret key has, below any mapping, and logins in all texts."""
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN
            if is_secret(str(key)) and each not in (None, "", [], {}, 0, False)
            else redact_values(each)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_values(each) for each in value]
    return without_logins(value) if isinstance(value, str) else value

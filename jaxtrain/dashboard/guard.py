"""What stands before every answer: the Host header, the method, the token; and the headers that every answer has."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxtrain.observability.metrics_files import json_value

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_CONTENT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_HEADERS = {
    "content-security-policy": _CONTENT,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


class Json(JSONResponse):
    """An answer in JSON. What files hold beside it is no error: NaN becomes null, and half of a surrogate pair is escaped."""

    def render(self, content: Any) -> bytes:
        """The text."""
        try:
            return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
        except ValueError:
            return json.dumps(json_value(content), allow_nan=False, separators=(",", ":")).encode()


def error(status: int, sentence: str, **headers: str) -> Json:
    """An answer that says what is wrong."""
    return Json({"error": sentence}, status, headers)


class Guard:
    """Lets through what may be answered.

    *The Host header.* It must be a name of this server, or the address that the request came to, whatever the port. A page of
    somebody else whose name was made to lead to this machine (DNS rebinding) still has that name there. A port says nothing
    of that, and behind `ssh -L 8080:localhost:3001` it is another one than the server's.
    *The method.* GET and HEAD alone: nothing can be changed.
    *The token.* In a cookie, in `Authorization: Bearer`, or in the address of the page, which then sets the cookie.
    """

    def __init__(self, app: ASGIApp, *, token: str, names: Collection[str], prefix: str):
        """Guards `app`.

        Args:
          app: what answers.
          token: opens it.
          names: of the Host header that are let through, beside those of the loopback interface.
          prefix: of every path, as in `/jax`; "" for none.
        """
        self._app, self._token, self._prefix = app, token, prefix
        # Two dashboards that are forwarded to two ports of one machine share its cookies.
        self._cookie = f"jaxtrain_{hashlib.sha256(token.encode()).hexdigest()[:12]}"
        self._names = {*LOOPBACK, *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return
        scope = {**scope, "path": self._without_prefix(scope["path"])}
        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, _with_headers(send))

    def _without_prefix(self, path: str) -> str:
        """A proxy may leave the prefix in the path, or take it out."""
        below = path.removeprefix(self._prefix)
        return below if self._prefix and (below.startswith("/") or not below) else path

    def _refusal(self, scope: Scope) -> Response | None:
        """What to answer instead of the page."""
        headers = Headers(scope=scope)
        if not self._is_ours(headers, scope["server"][0]):
            return error(
                400, "The Host header names another machine; open the address that jaxtrain dashboard printed."
            )
        if scope["method"] not in ("GET", "HEAD"):
            return error(405, "The dashboard is read, never written to.", allow="GET, HEAD")
        if not scope["path"]:  # /jax: relative addresses need /jax/
            return RedirectResponse(f"{self._prefix}/" + (f"?{_query(scope)}" if _query(scope) else ""), 308)
        if scope["path"] == "/" and (given := _parameter(scope, "token")) is not None:
            return self._admit(scope, given)
        if not self._is_known(headers):
            return error(
                401, "The token is missing; open the address that jaxtrain dashboard printed, with its ?token=."
            )
        return None

    def _is_ours(self, headers: Headers, address: str) -> bool:
        """Whether the Host header is a name of ours, or the address that the request came to."""
        hosts = headers.getlist("host")
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        return match is not None and (match["name"].lower() in self._names or match["name"].strip("[]") == address)

    def _admit(self, scope: Scope, given: str) -> Response:
        if not self._matches(given):
            return error(401, "The token is another one; open the address that jaxtrain dashboard printed.")
        rest = [(name, value) for name, value in _parameters(scope) if name != "token"]
        response = RedirectResponse("./" + (f"?{urlencode(rest)}" if rest else ""), 303)
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path=f"{self._prefix}/")
        return response

    def _is_known(self, headers: Headers) -> bool:
        for text in headers.getlist("authorization"):
            scheme, _, given = text.partition(" ")
            if scheme.lower() == "bearer" and self._matches(given.strip()):
                return True
        return any(self._matches(given) for text in headers.getlist("cookie") for given in _cookies(text, self._cookie))

    def _matches(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _query(scope: Scope) -> str:
    return scope["query_string"].decode("latin-1")


def _parameters(scope: Scope) -> list[tuple[str, str]]:
    try:
        return parse_qsl(_query(scope), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        return []


def _parameter(scope: Scope, name: str) -> str | None:
    return next((value for key, value in _parameters(scope) if key == name), None)


def _cookies(text: str, name: str) -> list[str]:
    """The values of those of that name; one of another program that is no cookie hides them from nobody."""
    found = []
    for part in text.split(";"):
        cookie: SimpleCookie = SimpleCookie()
        try:
            cookie.load(part.strip())
        except CookieError:
            continue
        if name in cookie:
            found.append(cookie[name].value)
    return found


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            added: list[Any] = [
                (name.encode(), value.encode()) for name, value in _HEADERS.items() if name.encode() not in there
            ]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sending

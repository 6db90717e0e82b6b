"""The door: who may call (host, origin, token) and how much a body may hold. ASGI, before any route."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dualparal.server.errors import ApiError
from dualparal.server.reference import MAX_BYTES
from dualparal.server.settings import Settings, is_address, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

COOKIE = "dualparal"
MAX_BODY = 64 * 1024  # bytes: prompts of 4000 characters and what a form puts around them
_UPLOAD = "POST", "/v1/videos"  # with an image, where the model takes one
_BODY_SECONDS = 60.0  # for a whole body
_SEND_SECONDS = 60.0  # for a client to take some 64 KiB
_OPEN = "/", "/healthz", "/session"  # without a token
_OPEN_FOLDER = "/page/"
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; media-src 'self' blob:; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
        b"form-action 'self'",
    ),
)


class Guard:
    """Refuses calls of strangers before a route sees them.

    * ``Host`` is an IP address, localhost, or a name that the server was told: a page of another site whose name leads
      to this address (DNS rebinding) is refused.
    * ``Origin``, where a browser sends one, is that same host: pages of other sites cannot ask for anything.
    * With a token: ``Authorization: Bearer`` or the page's cookie, but for the page itself and ``/healthz``.
    * A body has at most ``MAX_BODY`` bytes, or an image's where the model takes one, whatever its header says, and
      comes in time. Who does not read the answer is left.
    """

    def __init__(self, app: Any, settings: Settings) -> None:
        self._app, self._token = app, settings.token
        self._upload = MAX_BODY + (MAX_BYTES if max(settings.image_counts) else 0)
        self._names = {name.lower() for name in (settings.host, *settings.allow_hosts) if not is_address(name)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a call, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope["path"], headers)
            is_upload = (scope["method"], scope["path"]) == _UPLOAD
            body = _limited(receive, headers, self._upload if is_upload else MAX_BODY)
        except ApiError as error:
            await _refuse(error, send)
            return

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await asyncio.wait_for(send(message), _SEND_SECONDS)

        await self._app(scope, body, answer)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name = _name(host)
        if not (is_address(name) or is_loopback(name) or name in self._names):
            raise ApiError(
                421, "Host: this server does not know that name; start it with --allow-host NAME", code="host"
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "Origin: pages of other sites may not call this server", code="origin")
        is_open = path in _OPEN or path.startswith(_OPEN_FOLDER)
        if self._token is not None and not is_open and not self._knows(headers):
            raise ApiError(401, "Authorization: give 'Bearer' and the server's token", code="invalid_api_key")

    def _knows(self, headers: dict[str, str]) -> bool:
        assert self._token is not None, "there is one"
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(given.strip(), self._token):
            return True
        cookies = [each.strip().partition("=") for each in headers.get("cookie", "").split(";")]
        return any(name == COOKIE and same(value, cookie_of(self._token)) for name, _, value in cookies)


def same(given: str, wanted: str) -> bool:
    """True when two texts are equal; takes as long whatever they are."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())


def cookie_of(token: str) -> str:
    """The value of the page's cookie: not the token itself."""
    return hashlib.sha256(b"dualparal page:" + token.encode()).hexdigest()


def _name(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _limited(receive: Receive, headers: dict[str, str], most: int) -> Receive:
    """``receive`` that counts bytes and time. Raises ApiError (413): the header alone says that it is too much."""
    too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal()) or len(length) > 9 or int(length) > most:
        raise too_large
    taken, until, whole = 0, 0.0, length == "0" and "transfer-encoding" not in headers

    async def counted() -> MutableMapping[str, Any]:
        nonlocal taken, until, whole
        if whole:  # what comes then is that the client leaves, whenever it does
            return await receive()
        now = asyncio.get_running_loop().time()
        until = until or now + _BODY_SECONDS
        try:
            message = await asyncio.wait_for(receive(), until - now)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body took longer than {_BODY_SECONDS:g} s", code="body_too_slow") from None
        taken += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if taken > most:
            raise too_large
        return message

    return counted


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *_HEADERS]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

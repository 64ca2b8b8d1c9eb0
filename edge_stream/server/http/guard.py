"""What every request must pass first: origin, API key, size, time, and depth of JSON."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from hashlib import sha256
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_stream.server.errors import AUTH, ApiError
from edge_stream.server.settings import LOOPBACK, Settings

HISTORY_HEADER = "X-Edge-Stream-History"
ErrorResponse = Callable[[str, ApiError], Response]  # of a path and an error

PUBLIC = ("/health", "/v1/health")  # and the page, which asks for the key itself

_UNWANTED_BYTES, _UNWANTED_SECONDS = 64 << 20, 2.0  # of a body that is read after it was refused
_NO_SNIFFING = (b"X-Content-Type-Options", b"nosniff")
_DEPTH = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))


def depth_of(body: bytes, most: int) -> int:
    """How deeply brackets nest in JSON text; 0 if they cannot be more than `most`."""
    if body.count(b"[") + body.count(b"{") <= most:
        return 0
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")  # so that every quote begins or ends a string
    structure = body.translate(None, _NOT_STRUCTURE).replace(b'""', b"")
    brackets = b"".join(structure.split(b'"')[::2])
    return max(accumulate(map(_DEPTH.__getitem__, brackets)), default=0)


class Guard:
    """ASGI middleware. The whole body is read here, so that a slow sender costs only a coroutine."""

    def __init__(self, app: ASGIApp, settings: Settings, page: frozenset[str], error_response: ErrorResponse) -> None:
        self.app, self.settings, self.page, self.error_response = app, settings, page, error_response
        self._keys = [sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["method"] == "OPTIONS":  # a browser asks before it lets a page of another origin send something
            await Response()(scope, receive, self._with_cors(headers, send))
            return
        try:
            self._check_origin(headers)
            self._check_key(scope, headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            answer = self._with_cors(headers, send)
            if error.headers.get("Connection") == "close":
                answer = _reading_on(receive, answer)
            await self.error_response(scope["path"], error)(scope, receive, answer)
            return
        if body is None:  # the client has gone
            return
        if body:  # many clients do not say that it is JSON, or say something else, as curl does
            others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*others, (b"content-type", b"application/json")]
        delivered = False

        async def replay() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, self._with_cors(headers, send))

    def _is_allowed(self, origin: str) -> bool:
        """Whether --cors names an origin: itself, `*`, or `localhost` for every page of this machine."""
        allowed = self.settings.cors
        return origin in allowed or "*" in allowed or ("localhost" in allowed and _name(origin) in LOOPBACK)

    def _cors(self, headers: Headers) -> dict[str, str]:
        """What a browser is told."""
        origin = headers.get("origin")
        if origin is None or not self._is_allowed(origin):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "*, Authorization",  # which the star does not stand for
            "Access-Control-Expose-Headers": HISTORY_HEADER,
            "Vary": "Origin",
        }

    def _with_cors(self, headers: Headers, send: Send) -> Send:
        # written as other servers write them, for clients that look at capitals
        more = [_NO_SNIFFING]  # what a model writes is never a page, whatever it looks like
        more += [(name.encode(), value.encode("latin-1", "replace")) for name, value in self._cors(headers).items()]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *more]
            await send(message)

        return sending

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites: their scripts, and their names that resolve to this machine (DNS rebinding)."""
        host = headers.get("host", "")
        if self.settings.is_loopback and _name(f"//{host}") not in LOOPBACK:
            raise ApiError(403, "the Host header names another machine; this server answers on loopback only", AUTH)
        origin = headers.get("origin")
        if origin is None or self._is_allowed(origin):
            return
        try:
            same = urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            same = False
        if not same:
            raise ApiError(403, "pages of other origins may not use this server (--cors)", AUTH)

    def _check_key(self, scope: MutableMapping[str, Any], headers: Headers) -> None:
        if not self._keys or scope["path"] in PUBLIC or scope["path"] in self.page:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        key = key if kind.lower() == "bearer" else headers.get("x-api-key", "")
        given = sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, in constant time
        if not any(matches):
            raise ApiError(401, "a valid API key is needed", AUTH, {"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        limits = self.settings.limits
        length = headers.get("content-length", "0")
        too_large = ApiError(
            413, f"the request is larger than {limits.body_bytes} bytes", headers={"Connection": "close"}
        )
        if length.isdigit() and int(length) > limits.body_bytes:
            raise too_large
        parts: list[bytes] = []

        async def read() -> bool:
            size = 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.body_bytes:
                    raise too_large
                if not message.get("more_body"):
                    return True

        try:
            if not await asyncio.wait_for(read(), limits.body_seconds):
                return None
        except asyncio.TimeoutError:
            raise ApiError(
                408,
                f"the request had not arrived after {limits.body_seconds:g} seconds",
                headers={"Connection": "close"},
            ) from None
        body = b"".join(parts)
        if depth_of(body, limits.json_depth) > limits.json_depth:
            raise ApiError(400, f"the JSON is nested deeper than {limits.json_depth}")
        return body


def _reading_on(receive: Receive, send: Send) -> Send:
    """Read the rest of a body that is not wanted, for a while, between an answer and its end.

    A connection that is closed with something unread is reset, and its client may never see the answer.
    """

    async def rest() -> None:
        size = 0
        while size < _UNWANTED_BYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return

    async def sending(message: Message) -> None:
        if message["type"] != "http.response.body" or message.get("more_body"):
            await send(message)
            return
        await send({**message, "more_body": True})
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(rest(), _UNWANTED_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return sending


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

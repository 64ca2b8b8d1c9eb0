"""Errors as clients see them: `{"error": {"code", "message", "type"}}`, with llama-server's types."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.native import bindings
from edge_stream.text import sendable

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)

INVALID, AUTH, NOT_FOUND, NOT_SUPPORTED, UNAVAILABLE, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "not_supported_error",
    "unavailable_error",
    "server_error",
)


class ApiError(Exception):
    """An error that becomes a response. code: the HTTP status."""

    def __init__(self, code: int, message: str, kind: str = INVALID, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.kind, self.headers = code, message, kind, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return error_body(self.code, self.message, self.kind)


def error_body(code: int, message: str, kind: str = INVALID) -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": {"code": code, "message": sendable(message), "type": kind}}


def invalid(message: str) -> ApiError:
    """400: the request cannot be answered as it is."""
    return ApiError(400, message)


def no_images() -> ApiError:
    """400: the request has something other than text."""
    return invalid("image input is not supported, nor are files: this server reads text only")


def first_problem(problems: Sequence[Any]) -> ApiError:
    """400, out of what pydantic found: of a value that may have several forms, the problem with the one it has."""
    problem = max(problems, key=lambda one: len(one["loc"]))
    names = [str(part) for part in problem["loc"]]
    where = ".".join(name for name in names if name != "body" and "[" not in name)[:200]
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        message = f"the body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    elif problem["type"] == "model_attributes_type" and not where:
        message = "the body must be a JSON object"
    elif problem["type"] == "missing" and not where:
        message = "the request has no body: a JSON object is needed"
    elif where:
        message = f"{where}: {message}"
    return invalid(message[:500])


def unavailable(message: str, retry_after: int = 1) -> ApiError:
    """503 with Retry-After."""
    return ApiError(503, message, UNAVAILABLE, {"Retry-After": str(retry_after)})


def exhausted(error: BaseException) -> ApiError | None:
    """503 if an error says that the machine has no more of something, which may pass; None for others."""
    if isinstance(error, MemoryError) or (isinstance(error, EdgeStreamError) and error.status == bindings.MEMORY):
        return unavailable("the server has not enough memory for this at the moment", 5)
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        return unavailable(f"the server cannot do this at the moment: {error.strerror}", 5)
    return None

"""Refusals in the shape of OpenAI's API: a status, a kind, a code, the field, and one line that says the way out."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A refusal that a client is told.

    Attributes:
        status: of HTTP.
        body: JSON values, as OpenAI's clients read them.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            kind = "rate_limit_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

"""Requests to a vLLM server with our plug-in, over its OpenAI-compatible interface. Nothing here logs a key."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from deferral_train.errors import InputError

KEY_VARIABLE = "DEFERRAL_TRAIN_API_KEY"
TRIES, FIRST_WAIT, LONGEST_WAIT = 6, 0.5, 30.0  # of a request that the server is too busy for; seconds
BUSY = (429, 503)
TIMEOUT = 600.0  # seconds for one answer
LARGEST = 64 << 20  # bytes of one answer
PROBE = "deferral_probe"  # no option of the plug-in, which therefore refuses it by name


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key goes to the address that was named, and nowhere else."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


class ServerClient:
    """A server's few calls that are needed.

    Attributes:
        address: scheme, host and port, without a path. model: name that the server serves its verifier by.
        context: most tokens of a prompt and its answer; None where the server does not say.
        version: of vLLM; "unknown" where it does not say.

    Args:
        url: of the server, with or without ``/v1``.
        model: of several that it serves.

    Raises:
        InputError: an address that cannot be reached or is none, a refused key, a server without the plug-in.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.address = _address(url)
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
        self._key = os.environ.get(KEY_VARIABLE)
        served = self._json("GET", "/v1/models")
        found = [
            one
            for one in _list(served, "data")
            if isinstance(one, Mapping) and isinstance(one.get("id"), str)
        ]
        names = [one["id"] for one in found]
        if not names or (model is not None and model not in names):
            raise InputError(
                f"server={self.address} serves {', '.join(names) or 'no model'}, and not {model}"
            )
        self.model = names[0] if model is None else model
        room = found[names.index(self.model)].get("max_model_len")
        self.context = room if isinstance(room, int) and room > 0 else None
        self.version = self._version()

    def check_plug_in(self, ids: list[int]) -> None:
        """Refuse a server without our plug-in: only that knows which options of its own there are.

        Args:
            ids: of any prompt.

        Raises:
            InputError: naming the server and the remedy.
        """
        try:
            self.complete({"prompt": ids, "max_tokens": 1, "vllm_xargs": {PROBE: 1}})
        except ServerRefusalError as error:
            if PROBE in str(error):
                return
            raise
        raise InputError(
            f"server={self.address} has no plug-in of deferral-train in force; start it with --additional-config "
            '\'{"deferral": {"rule": ...}}\', see docs/serving_vllm.md'
        )

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """One answer of ``/v1/completions``.

        Raises:
            ServerRefusalError: the server does not take these settings.
            InputError: it is not there, too busy for too long, or fails.
        """
        return self._json("POST", "/v1/completions", {"model": self.model, **settings})

    def _version(self) -> str:
        try:
            return str(self._json("GET", "/version").get("version") or "unknown")[:40]
        except InputError:
            return "unknown"

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        for attempt in range(1, TRIES + 1):
            request = urllib.request.Request(self.address + path, data=data, headers=headers, method=method)
            try:
                with self._opener.open(request, timeout=TIMEOUT) as answer:
                    return _object(answer.read(LARGEST + 1), self.address + path)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in BUSY:
                        raise self._refusal(error, path) from None
                    if attempt == TRIES:
                        raise InputError(
                            f"server={self.address} was too busy {TRIES} times (status {error.code}); ask for fewer at "
                            "once (batch_size), and run the same command again"
                        ) from None
                    time.sleep(_wait(error.headers, attempt))
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                raise InputError(
                    f"server={self.address} cannot be reached ({reason}); start it with `vllm serve`, or correct the "
                    "address, and run the same command again"
                ) from None
        raise AssertionError  # the last attempt returned or raised

    def _refusal(self, error: urllib.error.HTTPError, path: str) -> InputError:
        if error.code in (401, 403):
            state = "is not right" if self._key else "is not set"
            return InputError(
                f"server={self.address} refuses access (status {error.code}): the environment variable {KEY_VARIABLE} "
                f"{state}; set it to the server's key"
            )
        said = _message(error)
        if 400 <= error.code < 500:
            return ServerRefusalError(f"server={self.address}{path} answers {error.code}: {said}")
        return InputError(
            f"server={self.address}{path} fails with status {error.code}: {said}; see the server's log"
        )


class ServerRefusalError(InputError):
    """The server does not take a request's settings."""


def _address(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or port == -1
        or parts.query
        or parts.fragment
    ):
        raise InputError(f"server={url!r} is no address; write http://HOST:PORT")
    if parts.username or parts.password:
        raise InputError(f"server={url!r} holds a user or key; put the key into the variable {KEY_VARIABLE}")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _wait(headers: Message, attempt: int) -> float:
    """Seconds until the next attempt: as the server says, else longer each time; never longer than `LONGEST_WAIT`."""
    try:
        asked = float(headers.get("Retry-After", ""))
    except ValueError:
        asked = FIRST_WAIT * 2 ** (attempt - 1)
    return min(max(asked, 0.0), LONGEST_WAIT)


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words about an error, one line of them."""
    try:
        text = error.read(1 << 16).decode("utf-8", "replace")
        found = json.loads(text)
        inner = found.get("error", found) if isinstance(found, dict) else found
        text = str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
    except (OSError, HTTPException):
        text = ""
    except (ValueError, RecursionError):
        pass
    return " ".join(text.split())[:300] or "no message"


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data) if len(data) <= LARGEST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{where} does not answer as an OpenAI-compatible server; correct the address")
    return found


def _list(value: Mapping[str, Any], name: str) -> list[Any]:
    found = value.get(name)
    return found if isinstance(found, list) else []

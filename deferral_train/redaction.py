"""Takes secrets out of what is recorded or printed: tokens, keys, passwords, addresses with credentials.

A record lies in folders that people upload. Three things are known to be secret: the value of an argument, field or
environment variable whose *name* says so, credentials inside of an address, and texts of the form that well-known
services give their tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

WITHHELD = "***"
# Parts of a name, split at its dots, dashes, underscores and capitals, that make its value secret.
_SECRET_WORDS = frozenset(
    {"secret", "password", "passwd", "passphrase", "credential", "credentials", "authorization", "apikey",
     "accesskey", "secretkey", "privatekey", "authtoken", "accesstoken", "hftoken", "pat"}
)  # fmt: skip
# Two words that say it only together: `key` alone may be a column, `auth` alone a switch.
_SECRET_PAIRS = frozenset(
    (first, second)
    for first in ("api", "access", "secret", "private", "signing", "account", "auth", "wandb", "license")
    for second in ("key", "keys")
)
# What stands before `token` where a token of a text is meant; after any other word, and alone, it is an access token.
_OF_TEXT = frozenset(
    ("pad", "eos", "bos", "unk", "sep", "cls", "mask", "special", "next", "previous", "last", "first", "draft",
     "drafted", "drafter", "verifier", "per", "new", "stop", "emitted", "gold", "at",
     "local", "image", "audio", "video", "start",
     "end", "decoder", "forced", "each", "this", "every", "a", "the")
)  # fmt: skip
_NAMED = r"[A-Za-z_][\w.-]*"
_ADDRESS = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<who>[^\s/@'\"]+)@")
_FORMS = re.compile(
    r"\b(?:hf_(?!token|hub|home|datasets|transfer)[A-Za-z0-9]{6,}|api_org_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{12,}"
    r"|sk-[A-Za-z0-9_-]{16,}|xox[abeoprs]-[\w-]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/_.=~-]{8,}")
_VALUE = r"(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;&'\"}\])]+)"
_EQUALS = re.compile(rf"(?P<name>{_NAMED})(?P<between>['\"]?\s*=\s*){_VALUE}")
_COLON = re.compile(rf"(?P<name>{_NAMED})(?P<between>['\"]?\s*:\s*){_VALUE}")
_FLAG = re.compile(rf"(?P<name>--{_NAMED})(?P<between>\s+)(?P<value>[^\s-]\S*)")
_SHORTEST = 8  # characters of an environment value that is looked for in texts


def is_secret(name: str) -> bool:
    """True where an argument, field or variable of this name holds a secret: ``token``, ``hf_token``, ``api-key``."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if any(word in _SECRET_WORDS for word in words):
        return True
    if words and words[-1] == "token":
        return len(words) == 1 or words[-2] not in _OF_TEXT
    return any(pair in _SECRET_PAIRS for pair in pairwise(words))


def redacted_text(text: str) -> str:
    """``text`` without secrets; everything else stays as it is."""
    if not text:
        return text
    for secret in _of_environment():
        text = text.replace(secret, WITHHELD)
    text = _ADDRESS.sub(rf"\g<scheme>{WITHHELD}@", text)
    text = _FORMS.sub(WITHHELD, text)
    text = _BEARER.sub(rf"\1 {WITHHELD}", text)
    text = _EQUALS.sub(_withhold, text)
    text = _COLON.sub(lambda match: match[0] if match["name"].lower() == "token" else _withhold(match), text)
    return _FLAG.sub(_withhold, text)


def _withhold(match: re.Match[str]) -> str:
    if not is_secret(match["name"]) or match["value"].strip("'\"").lower() in (
        "",
        "none",
        "null",
        "true",
        "false",
    ):
        return match[0]
    return f"{match['name']}{match['between']}{WITHHELD}"


def _of_environment() -> list[str]:
    """Values of environment variables that hold secrets, the longest first."""
    values = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and is_secret(name)}
    return sorted(values, key=len, reverse=True)


def redacted_words(words: Sequence[str]) -> list[str]:
    """A command line without secrets: ``--token x``, ``--token=x`` and what :func:`redacted_text` finds in a word."""
    clean: list[str] = []
    withhold = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if withhold and not word.startswith("--"):
            clean.append(WITHHELD)
            withhold = False
            continue
        secret = flag.startswith("-") and is_secret(flag)
        withhold = secret and not equals
        clean.append(f"{flag}={WITHHELD}" if secret and equals else redacted_text(word))
    return clean


def redacted(value: Any, name: str = "") -> Any:
    """A JSON-like value without secrets: texts in fields of a secret name, and secrets within any text.

    Numbers, switches and None stay, whatever their field is called: a count of tokens is no secret.
    """
    if isinstance(value, Mapping):
        return {_key(key): redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return WITHHELD if value and is_secret(name) else redacted_text(value)


def _key(key: Any) -> Any:
    return redacted_text(key) if isinstance(key, str) else key

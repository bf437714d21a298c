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
    {"secret", "secrets", "password", "passwords", "passwd", "passphrase", "passcode", "pwd", "credential",
     "credentials", "authorization", "auth", "bearer", "cookie", "cookies", "apikey", "apikeys", "accesskey",
     "secretkey", "privatekey", "authtoken", "accesstoken", "hftoken", "pat", "pass", "sas"}
)  # fmt: skip
# Endings of a word that say it without a break: PGPASSWORD.
_SECRET_ENDINGS = ("password", "passwd", "passphrase", "secret", "apikey")
# Two words that say it only together: `key` alone may be a column, `string` alone anything.
_SECRET_PAIRS = frozenset(
    (first, second)
    for first in (
        "api",
        "access",
        "secret",
        "private",
        "signing",
        "account",
        "auth",
        "wandb",
        "license",
        "ssh",
    )
    for second in ("key", "keys")
) | {("connection", "string"), ("access", "signature")}
# What stands before `token` where a token of a text is meant; after any other word, and alone, it is an access token.
_OF_TEXT = frozenset(
    ("pad", "eos", "bos", "unk", "sep", "cls", "mask", "special", "next", "previous", "last", "first", "draft",
     "drafted", "drafter", "verifier", "per", "new", "stop", "emitted", "gold", "at", "learned",
     "local", "image", "audio", "video", "start",
     "end", "decoder", "forced", "each", "this", "every", "a", "the")
)  # fmt: skip
_OF_ACCESS = ("access", "api", "auth", "hf", "hub", "bearer")  # before `tokens`: of access, not of a text
_NAMED = r"[A-Za-z_][\w.-]*"
_ADDRESS = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<who>[^\s/@'\"]+)@")
_FORMS = re.compile(
    r"\b(?:hf_(?!token|hub|home|datasets|transfer)[A-Za-z0-9]{6,}|api_org_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{12,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{24,}|dckr_pat_[\w-]{16,}"
    r"|wandb_v\d_\w{20,}|ya29\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|sk-(?:[A-Za-z0-9]{1,12}-){0,3}[A-Za-z0-9_]{20,}[\w-]*|xox[abeoprs]-[\w-]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|AIza[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
    re.DOTALL,
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/_.=~-]{8,}")
_VALUE = r"(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;&'\"}\])]+)"
_EQUALS = re.compile(rf"(?P<name>{_NAMED})(?P<between>['\"]?\s*=\s*){_VALUE}")
# Rules are written name:parameter=value, without a space: so is no secret but in the header of a request.
_COLON = re.compile(rf"(?P<name>{_NAMED})(?P<between>['\"]\s*:\s*|\s*:\s+){_VALUE}")
_HEADER = re.compile(rf"(?P<name>[A-Za-z][\w-]*)(?P<between>:){_VALUE}")
_FLAG = re.compile(rf"(?P<name>--{_NAMED})(?P<between>\s+)(?P<value>[^\s-]\S*)")
# Of an address's query, whatever is called so: the names by which stores sign their links.
_QUERY = re.compile(
    r"(?i)(?P<name>[?&;](?:key|sig|signature|x-amz-[\w-]+|x-goog-[\w-]+|code|session)=)[^\s&;'\"]+"
)
# Of programs' command lines, where our own names have no place.
_PROGRAM = "command:"
_PROGRAM_FLAGS = re.compile(
    r"(?P<name>(?:^|(?<=\s))(?:--?[\w-]*key|--session|-k|-p|-t))(?P<between>[=\s]\s*)(?P<value>'[^']*'|\"[^\"]*\"|\S+)"
)
_PROGRAM_USER = re.compile(r"(?P<name>(?:^|(?<=\s))(?:-u|--user)[=\s]\s*['\"]?[^\s:'\"]+:)[^\s'\"]+")
_TYPED = re.compile(r"\b(?P<name>[Tt]oken:\s+)(?=\S*\d)(?=\S*[A-Za-z])[A-Za-z0-9_.~+/-]{8,}(?![\w=])")
_SHORTEST = 8  # characters of an environment value that is looked for in texts


def is_secret(name: str) -> bool:
    """True where an argument, field or variable of this name holds a secret: ``token``, ``hf_token``, ``api-key``."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words):
        return True
    if words and words[-1] == "token":
        return len(words) == 1 or words[-2] not in _OF_TEXT
    if len(words) > 1 and words[-1] == "tokens":
        return words[-2] in _OF_ACCESS
    return any(pair in _SECRET_PAIRS for pair in pairwise(words))


def redacted_text(text: str) -> str:
    """``text`` without secrets; everything else stays as it is."""
    if not text:
        return text
    for secret in _of_environment():
        text = text.replace(secret, WITHHELD)
    text = _ADDRESS.sub(rf"\g<scheme>{WITHHELD}@", text)
    if "://" in text:
        text = _QUERY.sub(rf"\g<name>{WITHHELD}", text)
    text = _FORMS.sub(WITHHELD, text)
    text = _BEARER.sub(rf"\1 {WITHHELD}", text)
    if text.startswith(_PROGRAM):
        text = _PROGRAM_FLAGS.sub(rf"\g<name>\g<between>{WITHHELD}", text)
        text = _PROGRAM_USER.sub(rf"\g<name>{WITHHELD}", text)
        text = _HEADER.sub(_withhold, text)
    text = _EQUALS.sub(_withhold, text)
    text = _COLON.sub(lambda match: match[0] if _is_of_a_sentence(match) else _withhold(match), text)
    text = _TYPED.sub(rf"\g<name>{WITHHELD}", text)
    return _FLAG.sub(_withhold, text)


def _is_of_a_sentence(match: re.Match[str]) -> bool:
    """``token: x`` and ``pass: x`` without quotes, which may speak of a token of a text or a pass of a model."""
    return match["between"][0] not in "'\"" and match["name"].lower() in (
        "token",
        "pass",
        "auth",
        "pat",
        "sas",
    )


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
    """Values of environment variables that hold secrets, the longest first; places of files and sockets are none."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST
        and not value.startswith(("/", "~"))
        and name not in ("PWD", "OLDPWD")
        and (is_secret(name) or name.endswith("_KEY"))
    }
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
    """A JSON-like value without secrets: what lies in fields of a secret name, and secrets within any text.

    Switches and None stay, whatever their field is called, and numbers unless it is called a password: a count of
    tokens is no secret. A list of two texts is taken for a name and its value, as headers are often written.
    """
    if isinstance(value, Mapping):
        signed = any(
            isinstance(key, str) and key.lower() == "secret" for key in value
        )  # as fsspec takes them
        return {
            _key(key): redacted(
                item, name if is_secret(name) else "secret" if signed and key == "key" else str(key)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        named = len(value) == 2 and all(isinstance(item, str) for item in value) and is_secret(value[0])
        if named and not is_secret(name):
            return [value[0], redacted(value[1], value[0])]
        return [redacted(item, name) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return WITHHELD if re.search("(?i)passw|passcode|pwd|secret", name) else value
    if not isinstance(value, str):
        return value
    return WITHHELD if value and is_secret(name) else redacted_text(value)


def _key(key: Any) -> Any:
    return redacted_text(key) if isinstance(key, str) else key

"""Damage done to files on purpose: to their bytes, and to the values that a JSON or YAML text holds.

Every function takes a `random.Random`, so that hypothesis and atheris drive the same mutations.
"""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, -(2**63), 10**12),
    *(10**40, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", "0", "true", "nan", "../../etc/passwd", "/etc/passwd", "os:system", "os.system", "a" * 5000),
    *(
        "\x00",
        "\ud800",
        "é\u202e",
        "${HOME}",
        "%s{0}",
        "__class__",
        "shard-00000.arrow",
        "\n---\n",
        "!!python",
    ),
    *([], {}, [[]], [None], {"": None}, [10**12], {"__class__": "os.system"}),
)


def damage_bytes(random: Random, data: bytes) -> bytes:
    """A few flips, insertions, deletions, repetitions or a cut; never longer than 4 KiB more than ``data``."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(len(out) + 1)
        span = random.choice((1, 1, 2, 4, 8, 64))
        kind = random.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            out[at : at + span] = random.randbytes(span)
        elif kind == 2:
            del out[at : at + span]
        elif kind == 3:
            out[at:at] = out[max(0, at - span) : at] * random.choice((1, 2, 8))
        elif kind == 4:
            number = random.choice((0, 1, -1, 2**31 - 1, 2**31, 2**62, -(2**62), len(out)))
            out[at : at + 8] = struct.pack("<q", number)
        elif random.random() < 0.3:
            del out[at:]
    return bytes(out[: len(data) + 4096])


def damage_value(random: Random, value: Any) -> Any:
    """A copy of a JSON-like value with one to three of its places replaced, removed, moved or renamed."""
    root = [copy.deepcopy(value)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = random.choice(places)
        kind = random.randrange(7)
        if kind <= 2:
            holder[key] = copy.deepcopy(random.choice(HOSTILE))
        elif kind == 3 and holder is not root:
            del holder[key]
        elif kind == 4:
            other, at = random.choice(places)
            holder[key] = copy.deepcopy(other[at])
        elif kind == 5 and isinstance(holder, dict):
            holder[random.choice(["", "x", "features", "__init__", str(key) * 2])] = holder.pop(key)
        else:
            holder[key] = _nudged(random, holder[key])
    return root[0]


def _places(root: list[Any]) -> Any:
    stack: list[Any] = [root]
    while stack:
        holder = stack.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


def _nudged(random: Random, value: Any) -> Any:
    """Nearly the same value: what a hand-made mistake looks like."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return random.choice((-value, value + 1, value - 1, float(value), str(value), [value]))
    if isinstance(value, str):
        return random.choice((value[:-1], value + "x", value.upper(), [value], {value: value}))
    if isinstance(value, list):
        return random.choice((value[:-1], value * 2, {str(i): v for i, v in enumerate(value)}, value[::-1]))
    return random.choice((list(value), [value], dict(list(value.items())[:-1])))


def damage_json(random: Random, data: bytes) -> bytes:
    """Damage the values that a JSON text holds; other bytes, and one time in five, the bytes themselves."""
    if random.random() < 0.2:
        return damage_bytes(random, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return damage_bytes(random, data)
    return dump(damage_value(random, value))


def damage_json_lines(random: Random, data: bytes) -> bytes:
    """Damage one line of JSON lines, or their order and number."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    kind = random.randrange(8)
    if kind == 0:
        random.shuffle(lines)
    elif kind == 1:
        lines.insert(at, lines[random.randrange(len(lines))])
    elif kind == 2:
        del lines[at]
    else:
        lines[at] = damage_json(random, lines[at])
    return b"\n".join(lines)


def damage_safetensors(random: Random, data: bytes) -> bytes:
    """Damage the JSON header of a safetensors file and state its new length, or damage the bytes."""
    if random.random() < 0.4 or len(data) < 8:
        return damage_bytes(random, data)
    size = struct.unpack("<Q", data[:8])[0]
    header = damage_json(random, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def dump(value: Any) -> bytes:
    """JSON as a careless writer would: NaN and lone surrogates included."""
    return json.dumps(value).encode()

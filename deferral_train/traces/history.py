"""Tokens before each row's position, worked out from the rows before it: what ``previous_token_*`` holds online.

N rows, ordered by prompt and position within each shard.
"""

from __future__ import annotations

import numpy as np


def previous_tokens(prompt: np.ndarray, position: np.ndarray, token: np.ndarray, back: int) -> np.ndarray:
    """The token ``back`` places before each row, int64 [N]; -1 where no row of the prompt holds it.

    Args:
        prompt, position, token: columns [N]; ``token`` is the one that stands at the row's position.
        back: 1 for the token just before.
    """
    found = np.full(len(token), -1, dtype=np.int64)
    same = (prompt[back:] == prompt[:-back]) & (position[back:] == position[:-back] + back)
    found[back:][same] = token[:-back][same]
    return found

"""A table of each token's most frequent successor: what Max-Gram proposes where the text gives no match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deferral_train import provenance
from deferral_train.errors import InputError

FORMAT = "deferral-train bigrams 1"


class BigramTable:
    """Greedy successors by token id.

    Args:
        successor: [V] int32, the token that most often followed each token; -1 where it was never seen.
        tokenizer: fingerprint of the tokenizer that the ids belong to.

    Raises:
        InputError: ids outside the vocabulary.
    """

    def __init__(self, successor: Tensor, tokenizer: str) -> None:
        if successor.dim() != 1 or successor.dtype.is_floating_point:
            raise InputError(f"bigram table: successors are {list(successor.shape)}; give one integer per id")
        size = len(successor)
        if size and not -1 <= int(successor.min()) <= int(successor.max()) < size:
            raise InputError(f"bigram table: a successor lies outside the vocabulary 0..{size - 1}")
        self.successor, self.tokenizer = successor.to(torch.int32), tokenizer
        self._list: list[int] = self.successor.tolist()

    @property
    def fingerprint(self) -> str:
        """Hash of the table."""
        return provenance.hash_of([self.tokenizer, self._list])

    def __len__(self) -> int:
        return len(self._list)

    def __getitem__(self, token: int) -> int:
        return self._list[token] if 0 <= token < len(self._list) else -1

    @classmethod
    def learn(cls, texts: Iterable[Sequence[int]], vocab_size: int, tokenizer: str) -> BigramTable:
        """Count pairs of neighbours in texts given as ids; of equally frequent successors the lowest id.

        Pairs never cross from one text to the next.
        """
        counts: dict[int, int] = {}
        for text in texts:
            ids = torch.as_tensor(text, dtype=torch.int64)
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise InputError(f"bigram table: a text holds ids outside the vocabulary 0..{vocab_size - 1}")
            pairs, times = (ids[:-1] * vocab_size + ids[1:]).unique(return_counts=True)
            for pair, count in zip(pairs.tolist(), times.tolist()):
                counts[pair] = counts.get(pair, 0) + count
        successor, best = [-1] * vocab_size, [0] * vocab_size
        for pair in sorted(counts):
            first, second = divmod(pair, vocab_size)
            if counts[pair] > best[first]:
                successor[first], best[first] = second, counts[pair]
        return cls(torch.tensor(successor, dtype=torch.int32), tokenizer)

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors, with the tokenizer's fingerprint in its header."""
        metadata = {"format": FORMAT, "tokenizer": self.tokenizer}
        save_file({"successor": self.successor}, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> BigramTable:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: no such file, or not a bigram table.
        """
        if not Path(path).is_file():
            raise InputError(f"bigrams: no file {path}; make one with BigramTable.learn(...).save(path)")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or set(file.keys()) != {"successor"}:
                    raise InputError(f"bigrams: {path} is not a bigram table ({FORMAT})")
                return cls(file.get_tensor("successor"), metadata.get("tokenizer", ""))
        except SafetensorError as error:
            raise InputError(f"bigrams: {path} is not a safetensors file ({error})") from error

    def check(self, tokenizer: str | None, vocab_size: int) -> None:
        """Refuse a table whose ids mean something else here.

        Args:
            tokenizer: fingerprint of the tokenizer in use; None where it is not known.

        Raises:
            InputError: another tokenizer, or another vocabulary.
        """
        if tokenizer is not None and self.tokenizer != tokenizer:
            raise InputError(
                f"bigrams: the table was learned with tokenizer {self.tokenizer[:12]}, these models use "
                f"{tokenizer[:12]}; learn it again with this tokenizer"
            )
        if len(self) != vocab_size:
            raise InputError(
                f"bigrams: the table has {len(self)} ids, the models {vocab_size}; learn it again with this "
                "tokenizer"
            )

"""Runs a given text as the draft: all of it in the row's first round, then nothing more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deferral_train.decoding.cached_model import CachedModel
from deferral_train.decoding.cascade_draft import CascadeDraft, Grown, Piece
from deferral_train.decoding.distributions import Drafted
from deferral_train.decoding.drafting.given import GivenDraft
from deferral_train.decoding.tokens import TokenRows


class GivenProposer:
    """The running side of a given draft.

    Args:
        given: a text for each row of the call.
        tokens: of the call.
        vocab_size: columns of the logits.
    """

    def __init__(self, given: GivenDraft, tokens: TokenRows, vocab_size: int) -> None:
        self.given, self.tokens, self.vocab_size = given, tokens, vocab_size
        self.models: Sequence[CachedModel] = []

    def propose(self, limits: Sequence[int], exact: bool) -> CascadeDraft:
        """The texts of rows that have emitted nothing yet; they are one-hots.

        Up to the last place that a row may emit, which limits leave to the verifier: nothing is saved there, but the
        rule leans towards the text at every place.
        """
        tokens = self.tokens
        texts = [
            list(self.given.texts[row][: limit + 1]) if length == tokens.prompt_length else []
            for row, length, limit in zip(tokens.rows, tokens.lengths, limits)
        ]
        counts = [len(text) for text in texts]
        depth = max(counts)
        host = [text + [0] * (depth - len(text)) for text in texts]
        block = torch.tensor(host, dtype=torch.long, device=tokens.device).reshape(len(host), depth)
        tokens.write(0, block)
        grown = Grown.empty(counts)
        grown.add(Piece(0, list(grown.counts), counts, block))
        return CascadeDraft(
            block,
            counts,
            (),
            calls=[0] * len(host),
            drafted=Drafted(counts, [False] * len(counts)),
            grown=grown,
            places=depth,
            vocabulary=self.vocab_size,
            explicit=True,
        )

    def observe(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """Nothing to learn: what did not stand is not proposed again."""

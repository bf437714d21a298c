"""TokenGapHead: what each token costs the finished text when it is kept, for sampling (form (b) of sequence labels).

N rows, K candidates, V vocabulary, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead, decisions
from deferral_train.heads.bodies import make_body
from deferral_train.heads.features import fields_of
from deferral_train.heads.lookups import FIELDS_READ
from deferral_train.heads.truth import LOG_FLOOR
from deferral_train.rules.summary import TOKEN_FIELDS, Summary

SPOKEN = ("token", "drafter_logprob", "verifier_logprob")
TOKEN_FEATURES = ("token_embedding", "token_worth")


class TokenGapHead(DeferralHead):
    """Regresses gap(x) = E_{y ~ p} Q(y) - Q(x), Q the score of the finished text, for any token x of a position.

    gap^(x) = c + a p(x) + b log p(x) / l + d log q(x) / l + worth(x), with l = `LOG_FLOOR`: the body gives (c, a, b, d)
    once per position from its features; worth(x) is linear in the token's row of the verifier's output matrix (feature
    ``token_embedding``), one number per token once folded (``token_worth``). So the whole vocabulary costs a few
    multiply-adds a token.

    Raises:
        InputError: another stage or loss than ``verify`` and ``sequence_sampled``, or features that look up or speak of
            a token in another way.
    """

    head_type = "token_gap"
    objectives = ("squared", "huber")
    tokenwise: ClassVar[bool] = True

    def __init__(self, features: Sequence[str], **arguments: Any) -> None:
        super().__init__(features, **arguments)
        if self.stage != "verify" or self.loss != "sequence_sampled":
            raise InputError(
                "a token_gap head needs stage='verify' and loss='sequence_sampled' (labels with --label-form token), "
                f"got {self.stage!r} and {self.loss!r}"
            )

    @property
    def outputs(self) -> int:
        return 4

    def extra_columns(self) -> tuple[str, ...]:
        return SPOKEN

    def make_body(self, kind: str, hidden: Sequence[int]) -> nn.Module:
        """The map from features of the position to the four numbers; beside it ``worth``, linear in the token's row."""
        names = {str(feature): feature.name for feature in self.inputs.features}
        wrong = [
            text
            for text, name in names.items()
            if (name in FIELDS_READ or TOKEN_FIELDS & set(fields_of(name))) and text not in TOKEN_FEATURES
        ]
        if wrong:
            raise InputError(
                f"a token_gap head reads the token through token_embedding and its log q, log p by itself; leave out "
                f"{', '.join(wrong)}"
            )
        spans = self.inputs.spans
        self.of_token = next((spans[name] for name in TOKEN_FEATURES if name in spans), None)
        places = [
            place for name, span in spans.items() if name not in TOKEN_FEATURES
            for place in range(span.start, span.stop)
        ]  # fmt: skip
        if not places:
            raise InputError("a token_gap head needs a feature of the position, such as verifier_max")
        self.register_buffer("of_position", torch.tensor(places), persistent=False)
        self.worth = None
        if self.of_token is not None:
            self.worth = nn.Linear(self.of_token.stop - self.of_token.start, 1, bias=False)
            nn.init.zeros_(self.worth.weight)
        return make_body(kind, len(places), self.outputs, hidden)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``gap`` [N] of each row's token."""
        z = self.prepare(x)
        drafter, verifier = (self.inputs.column(x, name).unsqueeze(-1) for name in SPOKEN[1:])
        gap = self._of_candidates(z, drafter, verifier)[:, 0]
        if self.worth is not None:
            gap = gap + self.worth(z[:, self.of_token])[:, 0]
        return {"gap": gap}

    def token_gap(
        self, tokens: Tensor | None, drafter_logprobs: Tensor, verifier_logprobs: Tensor, summary: Summary
    ) -> Tensor:
        """gap^ [.., K] of candidates with ids ``tokens`` [.., K], or of the whole vocabulary in order where None."""
        shape = drafter_logprobs.shape
        # The features of the position do not depend on the token; one stands in for all of them.
        zeros = torch.zeros(shape[:-1], device=drafter_logprobs.device)
        stand_in = {"token": zeros.long(), "drafter_logprob": zeros, "verifier_logprob": zeros}
        x = self.columns(summary.with_fields(stand_in))
        with decisions(x):
            z = self.prepare(x.reshape(-1, x.shape[-1]))
            logs = [t.reshape(-1, shape[-1]).float() for t in (drafter_logprobs, verifier_logprobs)]
            gap = self._of_candidates(z, *logs).reshape(shape)
            if self.worth is None:
                return gap
            worths = self.worths()
            return gap + (worths[: shape[-1]] if tokens is None else worths[tokens.clamp_min(0)])

    def worths(self) -> Tensor:
        """worth(v) of every token, [V]."""
        lookups = self.inputs.lookups
        assert self.worth is not None
        assert lookups is not None
        rows = lookups.matrix.float() if lookups.width else lookups.get_buffer("token_worth").unsqueeze(-1)
        return self.worth((rows - self.mean[self.of_token]) * self.scale[self.of_token])[:, 0]

    def _of_candidates(self, z: Tensor, drafter: Tensor, verifier: Tensor) -> Tensor:
        """gap^ [N, K] without the tokens' worth, from features [N, F] and log q, log p [N, K]."""
        c, a, b, d = self.body(z.index_select(-1, self.get_buffer("of_position"))).split(1, dim=-1)
        log_q, log_p = drafter.clamp_min(LOG_FLOOR), verifier.clamp_min(LOG_FLOOR)
        return c + a * log_p.exp() + (b * log_p + d * log_q) / LOG_FLOOR

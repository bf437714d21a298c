"""One table of rule instances that every test of rules runs over."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from deferral_train.rules import RULES, BlockRule, Rule, Summary, make_rule
from deferral_train.rules.rejected_pairs import RejectedPairs
from deferral_train.testing import RuleReport, check_rule


class LinearGap:
    """A small gap estimator with fixed weights, of the shape that trained heads have."""

    features = ("drafter_max", "verifier_max", "verifier_at_drafter_argmax", "kl")
    stage = "verify"

    def gap(self, summary: Summary) -> Tensor:
        mixed = summary.verifier_max - 0.6 * summary.verifier_at_drafter_argmax - 0.4 * summary.drafter_max
        return mixed + 0.01 * summary.kl.clamp(max=5.0)


class DraftGap:
    """A draft-stage estimator: reads the drafter only, and estimates D_TV too."""

    features = ("drafter_max", "drafter_entropy")
    stage = "draft"

    def gap(self, summary: Summary) -> Tensor:
        return 0.7 - summary.drafter_max

    def tv(self, summary: Summary) -> Tensor:
        return torch.tanh(summary.drafter_entropy)


class TokenJudge:
    """A judge that looks at the drafted token and the verifier's distribution."""

    features = ("token", "verifier_logprob", "verifier_max")

    def score(self, summary: Summary) -> Tensor:
        known = summary.verifier_logprob.clamp(min=-30.0).exp()
        return torch.sigmoid(5 * known - summary.verifier_max + (summary.token % 3) / 3 - 0.4)


class TokenCost:
    """A small estimator of what each token costs, of the shape that token_gap heads have."""

    features = ("token", "drafter_logprob", "verifier_logprob", "verifier_max")

    def gap(self, summary: Summary) -> Tensor:
        names = ("token", "drafter_logprob", "verifier_logprob")
        token, *logs = (summary[name].unsqueeze(-1) for name in names)
        return self.token_gap(token, logs[0], logs[1], summary)[..., 0]

    def token_gap(self, tokens: Tensor | None, q: Tensor, p: Tensor, summary: Summary) -> Tensor:
        ids = torch.arange(q.shape[-1], device=q.device) if tokens is None else tokens
        return summary.verifier_max.unsqueeze(-1) - p.exp() + (ids % 3) / 5 - 0.25


PARAMETERS: dict[str, list[dict]] = {
    "lossless": [{}],
    "drafter_only": [{}],
    "verifier_only": [{}],
    "lossy": [{"alpha": 0.0}, {"alpha": 0.31}, {"alpha": 0.9}, {"alpha": 1.0}],
    "lenient": [{"alpha": 0.0}, {"alpha": 0.31}, {"alpha": 0.9}, {"alpha": 1.0}],
    "bild": [{"alpha": 1.3}, {"alpha": 0.37, "discrepancy": "tv"}],
    "chow": [{"alpha": 0.0}, {"alpha": 0.43}, {"alpha": 1.0}],
    "chow_log": [{"alpha": 0.0}, {"alpha": 1.2}],
    "diff": [{"alpha": -1.0}, {"alpha": -0.13}, {"alpha": 0.13}, {"alpha": 1.0}],
    "diff_log": [{"alpha": -0.2}, {"alpha": 0.3}],
    "opt": [{"alpha": -3.1}, {"alpha": -0.13}, {"alpha": 0.17}, {"alpha": 2.3}],
    "opt_log": [{"alpha": -0.2}, {"alpha": 0.3}],
    "opt_verifier": [{"alpha": -1.0}, {"alpha": 0.13}, {"alpha": 1.1}],
    "token_v1": [{"alpha": -1.0}, {"alpha": 0.13}, {"alpha": 1.0}],
    "token_v2": [{"alpha": -1.0}, {"alpha": 0.13}, {"alpha": 1.0}],
    "token_v3": [{"alpha": 0.0}, {"alpha": 0.37}, {"alpha": 1.0}],
    "ensemble": [{"weight": 0.0}, {"weight": 0.37}, {"weight": 1.0}],
    "typical": [{"epsilon": 0.0}, {"epsilon": 0.11}, {"epsilon": 0.3, "delta": 0.21}],
    "mentored": [{"divergence": 0.0}, {"divergence": 0.05}, {"divergence": 0.7}],
    "judi": [{"threshold": 0.0}, {"threshold": 0.31}, {"threshold": 1.7, "confidence": 1.0}],
    "ears": [{"tolerance": 0.0}, {"tolerance": 0.31}, {"tolerance": 1.0}],
    "csd": [{"ratio": 0.0}, {"ratio": 0.31}],
    "fly": [{"threshold": 0.0}, {"threshold": 0.7, "window": 1}],
    "fuzzy": [{"threshold": 0.0}, {"threshold": 0.06}, {"threshold": 0.7}],
    "cactus": [{"delta": 0.0}, {"delta": 0.03}, {"delta": 0.9}],
    "logit_margin": [{"margin": 0.0}, {"margin": 0.61}],
    "biased": [{"bias": 0.0}, {"bias": 0.23}, {"bias": 1.0}],
    "judge": [{"threshold": 0.4}, {"threshold": 1.0}],
    "learned": [{"alpha": 0.07}, {"alpha": -0.2}],
    "token_gap": [{"alpha": 0.31}, {"alpha": -0.2}],
}
# A rule that is not spoken of above is tried over its dial.
PARAMETERS |= {
    name: [{rule.dial.parameter: value} for value in rule.dial.swept(4)] if rule.dial else [{}]
    for name, rule in RULES.items()
    if name not in PARAMETERS
}
HEADS = {"judge": TokenJudge(), "learned": LinearGap(), "token_gap": TokenCost()}
EVERY = [(x, v) for x in range(64) for v in range(64) if x != v and (x + 2 * v) % 3 != 1]
TABLE = RejectedPairs(*torch.tensor([(x, v, 1 + (x + v) % 9) for x, v in EVERY]).unbind(1))
PARTS = {name: {"head": head} for name, head in HEADS.items()} | {"csd": {"table": TABLE}}


def build(name: str, parameters: dict) -> Rule:
    """An instance of a rule, with a head or a table where it needs one."""
    return make_rule(name, **parameters, **PARTS.get(name, {}))


@cache
def reports(name: str) -> tuple[RuleReport, ...]:
    """What `check_rule` finds on every instance of a rule; once per process."""
    return tuple(check_rule(build(name, parameters)) for parameters in PARAMETERS[name])


def instances() -> list[Rule]:
    """Every rule at several values of its dial."""
    rules = [build(name, parameters) for name, several in PARAMETERS.items() for parameters in several]
    return [*rules, make_rule("learned", head=DraftGap(), alpha=0.2)]


def with_target() -> list[Rule]:
    """Those of the instances that have a target distribution at each place: all but rules that judge blocks."""
    return [rule for rule in instances() if not isinstance(rule, BlockRule)]


def label(rule: Rule) -> str:
    """A test id."""
    value = "" if rule.dial_value is None else f"={rule.dial_value:g}"
    return f"{rule.name}{value}"

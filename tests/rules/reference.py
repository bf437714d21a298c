"""The slow, obvious twin of everything that emits a token: plain Python floats, one position at a time.

Written from the equations (docs/equations.md) without looking at the tensor code, and sharing nothing with it
but the rule's parameters. Distributions are lists of V floats. Used by tests and by nothing else.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from deferral_train.rules.summary import Summary

Distribution = list[float]
INFINITY = math.inf


def softmax(logits: Distribution) -> Distribution:
    """exp(z)/sum exp(z)."""
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def argmax(values: Distribution) -> int:
    """The lowest index of the largest value."""
    return values.index(max(values))


def sampling_distribution(
    decision: Distribution, given: Distribution | None, temperature: float
) -> Distribution:
    """One-hot of the lowest argmax at temperature 0, else softmax of the tempered (or the given) logits."""
    processed = decision if given is None else given
    if temperature == 0:
        top = argmax(processed)
        return [1.0 if v == top else 0.0 for v in range(len(processed))]
    return softmax(processed if given is not None else [z / temperature for z in decision])


def entropy(distribution: Distribution) -> float:
    """-sum p log p."""
    return -math.fsum(x * math.log(x) for x in distribution if x > 0)


def cross_entropy(p: Distribution, q: Distribution) -> float:
    """-sum p log q."""
    return math.fsum(INFINITY if b == 0 else -a * math.log(b) for a, b in zip(p, q) if a > 0)


def kl(p: Distribution, q: Distribution) -> float:
    """sum p log(p/q)."""
    return math.fsum(INFINITY if b == 0 else a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def js(p: Distribution, q: Distribution) -> float:
    """Jensen-Shannon divergence."""
    middle = [(a + b) / 2 for a, b in zip(p, q)]
    return (kl(p, middle) + kl(q, middle)) / 2


def total_variation(p: Distribution, q: Distribution) -> float:
    """sum max(0, p - q)."""
    return math.fsum(max(0.0, a - b) for a, b in zip(p, q))


class Position:
    """One position: decision distributions, sampling distributions, and what may be emitted."""

    def __init__(
        self,
        drafter: Distribution,
        verifier: Distribution,
        temperature: float,
        drafter_sampling: Distribution | None = None,
        verifier_sampling: Distribution | None = None,
    ) -> None:
        self.q_decision, self.p_decision = softmax(drafter), softmax(verifier)
        self.q = sampling_distribution(drafter, drafter_sampling, temperature)
        self.p = sampling_distribution(verifier, verifier_sampling, temperature)
        processed = verifier if verifier_sampling is None else verifier_sampling
        self.processed_q = softmax(drafter if drafter_sampling is None else drafter_sampling)
        self.processed_p = softmax(processed)
        self.allowed = [z > -INFINITY for z in processed]
        self.v_q, self.v_p = argmax(drafter), argmax(verifier)
        self.temperature = temperature
        self.tv = total_variation(self.p, self.q)
        self.drafter, self.verifier = drafter, verifier

    def fields(self, token: int | None = None) -> dict[str, float | int]:
        """Every summary field by its name."""
        q, p = self.q_decision, self.p_decision
        fields: dict[str, float | int] = {
            "drafter_max": max(q),
            "verifier_max": max(p),
            "drafter_margin": margin(self.drafter),
            "verifier_margin": margin(self.verifier),
            "drafter_argmax": self.v_q,
            "verifier_argmax": self.v_p,
            "drafter_at_verifier_argmax": q[self.v_p],
            "verifier_at_drafter_argmax": p[self.v_q],
            "drafter_entropy": entropy(q),
            "verifier_entropy": entropy(p),
            "kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "js": js(p, q),
            "cross_entropy": cross_entropy(p, q),
            "drafter_sum_squares": math.fsum(x * x for x in q),
            "verifier_sum_squares": math.fsum(x * x for x in p),
            "product_sum": math.fsum(a * b for a, b in zip(p, q)),
            "drafter_logsumexp": log_normaliser(self.drafter),
            "verifier_logsumexp": log_normaliser(self.verifier),
            "tv_unscaled": total_variation(p, q),
            "tv": self.tv,
        }
        if token is not None:
            fields["token"] = token
            fields["drafter_logprob"] = math.log(q[token]) if q[token] > 0 else -INFINITY
            fields["verifier_logprob"] = math.log(p[token]) if p[token] > 0 else -INFINITY
        return fields


def log_normaliser(logits: Distribution) -> float:
    """log sum exp(z)."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(z - top) for z in logits))


def margin(logits: Distribution) -> float:
    """The largest logit less the largest of the others; 1e4 stands for an only token."""
    top = argmax(logits)
    others = logits[:top] + logits[top + 1 :]
    return min(logits[top] - max(others), 1e4) if others else 1e4


def defers(rule: Any, at: Position) -> bool:
    """The decision of each position rule."""
    q, p = at.q_decision, at.p_decision
    name, alpha = rule.name, getattr(rule, "alpha", 0.0)
    if name in ("lossless", "verifier_only"):
        return True
    if name == "drafter_only":
        return False
    if name == "chow":
        return max(q) < 1 - alpha or alpha == 0
    if name == "chow_log":
        return entropy(q) > alpha or alpha == 0
    if name == "diff":
        return max(q) < max(p) - alpha
    if name == "diff_log":
        return entropy(q) > entropy(p) + alpha
    if name == "opt":
        return max(q) < max(p) - alpha * at.tv
    if name == "opt_log":
        return entropy(q) > entropy(p) + alpha * at.tv
    if name == "opt_verifier":
        return p[at.v_q] < max(p) - alpha * at.tv
    if name == "bild":
        return (cross_entropy(p, q) if rule.discrepancy == "cross_entropy" else at.tv) > alpha
    if name == "fuzzy":
        return js(p, q) >= rule.threshold
    if name == "judi":
        return not (kl(p, q) < rule.threshold and max(p) <= rule.confidence)
    if name == "learned":
        return float(rule.head.gap(_summary(at))) > alpha * at.tv
    raise KeyError(name)


def keeps(rule: Any, at: Position, v: int) -> bool:
    """The decision of each token rule on token v."""
    q, p = at.q_decision, at.p_decision
    name = rule.name
    if name == "token_v1":
        return q[v] >= max(p) - rule.alpha
    if name == "token_v2":
        return p[v] >= max(p) - rule.alpha
    if name == "token_v3":
        return p[v] >= (1 - rule.alpha) * max(p)
    if name == "typical":
        delta = math.sqrt(rule.epsilon) if rule.delta is None else rule.delta
        return p[v] > min(rule.epsilon, delta * math.exp(-entropy(p)))
    if name == "logit_margin":
        return rule.margin > 0 and max(at.verifier) - at.verifier[v] <= rule.margin
    if name == "csd":
        return _rejections(rule.table).get((v, at.v_p), 0) >= rule.least and p[v] >= rule.ratio * p[at.v_p]
    if name == "token_gap":
        price = max(0.0, 1 - p[v] / q[v]) if q[v] > 0 else 0.0
        return float(rule.head.gap(_summary(at, v))) <= rule.alpha * price
    raise KeyError(name)


@cache
def _rejections(table: Any) -> dict[tuple[int, int], int]:
    """How often each drafted token was rejected for each of the verifier's."""
    size = 1 << 31
    pairs = zip(table.keys.tolist(), table.counts.tolist())
    return {(key % size, key // size): count for key, count in pairs}


def target(rule: Any, at: Position) -> Distribution:
    """pi, the distribution that a drafted position emits."""
    if rule.name in _DISTRIBUTIONS:
        return _only_allowed(_DISTRIBUTIONS[rule.name](rule, at), at)
    keep = [_kept(rule, at, v) and at.allowed[v] for v in range(len(at.q))]
    eta = math.fsum(x for x, k in zip(at.q, keep) if not k)
    return [(x if k else 0.0) + y * eta for x, y, k in zip(at.q, at.p, keep)]


def _kept(rule: Any, at: Position, v: int) -> bool:
    try:
        return not defers(rule, at)
    except KeyError:
        return keeps(rule, at, v)


def _only_allowed(pi: Distribution, at: Position) -> Distribution:
    lost = math.fsum(x for x, a in zip(pi, at.allowed) if not a)
    return [(x if a else 0.0) + y * lost for x, y, a in zip(pi, at.p, at.allowed)]


def enumerate_step(pi: Distribution, q: Distribution) -> Distribution:
    """Distribution of draft x ~ q, accept with min(1, pi(x)/q(x)), else draw from max(0, pi - q), token by token."""
    excess = [max(0.0, b - a) for a, b in zip(q, pi)]
    total = math.fsum(excess)
    correction = [e / total for e in excess] if total > 0 else pi
    emitted = [0.0] * len(q)
    for x, drafted in enumerate(q):
        if drafted == 0:
            continue
        accept = min(1.0, pi[x] / drafted)
        emitted[x] += drafted * accept
        for v, weight in enumerate(correction):
            emitted[v] += drafted * (1 - accept) * weight
    return emitted


def _summary(at: Position, token: int | None = None) -> Summary:
    kinds = {float: torch.float64, int: torch.int64}
    fields = at.fields(token).items()
    return Summary.from_columns(
        {name: torch.tensor(value, dtype=kinds[type(value)]) for name, value in fields}
    )


def _clip(q: Distribution, p: Distribution, floor: float, cap: float) -> Distribution:
    return [max(min(a, b * cap if b > 0 else 0.0), b * floor) for a, b in zip(q, p)]


def _floor(q: Distribution, p: Distribution, cap: float) -> float:
    """The floor in [0, 1] with which the clipped distribution sums to one, by bisection; 0 where nothing is cut."""
    if math.fsum(_clip(q, p, 0.0, cap)) >= math.fsum(q):
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (low, middle) if math.fsum(_clip(q, p, middle, cap)) > 1 else (middle, high)
    return (low + high) / 2


def _lossy(rule: Any, at: Position) -> Distribution:
    cap = INFINITY if rule.alpha == 1 else 1 / (1 - rule.alpha)
    return _clip(at.q, at.p, _floor(at.q, at.p, cap), cap)


def _lenient(rule: Any, at: Position) -> Distribution:
    cap = INFINITY if rule.alpha == 1 else 1 / (1 - rule.alpha)
    accepted = _clip(at.q, at.p, 0.0, cap)
    excess = [max(0.0, b - a) for a, b in zip(at.q, at.p)]
    rejected, total = math.fsum(a - b for a, b in zip(at.q, accepted)), math.fsum(excess)
    return [a + (rejected * e / total if total > 0 else 0.0) for a, e in zip(accepted, excess)]


def _mentored(rule: Any, at: Position) -> Distribution:
    def distribution(log_cap: float) -> Distribution:
        cap = math.exp(log_cap) if log_cap < 700 else INFINITY
        return _clip(at.q, at.p, _floor(at.q, at.p, cap), cap)

    if rule.divergence == 0:
        return at.p
    if kl(at.p, distribution(INFINITY)) <= rule.divergence:
        return distribution(INFINITY)
    low, high = 0.0, 700.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(at.p, distribution(middle)) <= rule.divergence else (low, middle)
    return distribution(low)


def _cactus(rule: Any, at: Position) -> Distribution:
    emitted = [0.0] * len(at.q)
    for x, drafted in enumerate(at.q):
        if drafted == 0:
            continue
        raised = min(1.0, at.p[x] + math.sqrt(2 * rule.delta * at.p[x] * (1 - at.p[x])))
        rest = 1 - at.p[x]
        checked = [b * (1 - raised) / rest if rest > 0 else 0.0 for b in at.p]
        checked[x] = raised
        accept = min(1.0, raised / drafted)
        emitted[x] += drafted * accept
        excess = [max(0.0, c - a) for a, c in zip(at.q, checked)]
        total = math.fsum(excess)
        for v, e in enumerate(excess):
            emitted[v] += drafted * (1 - accept) * (e / total if total > 0 else 0.0)
    return emitted


def _ears(rule: Any, at: Position) -> Distribution:
    emitted = [0.0] * len(at.q)
    slack = rule.tolerance * (1 - max(at.p))
    excess = [max(0.0, b - a) for a, b in zip(at.q, at.p)]
    total = math.fsum(excess)
    for x, drafted in enumerate(at.q):
        if drafted == 0:
            continue
        accept = min(1.0, at.p[x] / drafted + slack) if at.p[x] > 0 else 0.0
        emitted[x] += drafted * accept
        for v, e in enumerate(excess):
            emitted[v] += drafted * (1 - accept) * (e / total if total > 0 else 0.0)
    return emitted


def _mixture(weight: float, at: Position) -> Distribution:
    return [weight * b + (1 - weight) * a for a, b in zip(at.q, at.p)]


def _ensemble(rule: Any, at: Position) -> Distribution:
    if at.temperature > 0:
        return _mixture(rule.weight, at)
    if rule.weight in (0, 1):
        return at.p if rule.weight == 1 else at.q
    pairs = zip(at.processed_q, at.processed_p, at.allowed)
    mixed = [rule.weight * b + (1 - rule.weight) * a if ok else -1.0 for a, b, ok in pairs]
    return [1.0 if v == argmax(mixed) else 0.0 for v in range(len(mixed))]


def _biased(rule: Any, at: Position) -> Distribution:
    if at.temperature > 0:
        return _mixture(1 - rule.bias, at)
    margin = INFINITY if rule.bias == 1 else rule.bias / (1 - rule.bias)
    return at.q if rule.bias > 0 and max(at.p_decision) - at.p_decision[at.v_q] <= margin else at.p


def _judge(rule: Any, at: Position) -> Distribution:
    excess = [max(0.0, b - a) for a, b in zip(at.q, at.p)]
    total = math.fsum(excess)
    emitted = [0.0] * len(at.q)
    for x, drafted in enumerate(at.q):
        approved = at.allowed[x] and float(rule.head.score(_summary(at, x))) > rule.threshold
        stands = drafted if approved else min(drafted, at.p[x])
        emitted[x] += stands
        for v, e in enumerate(excess):
            emitted[v] += (drafted - stands) * (e / total if total > 0 else 0.0)
    return emitted


_DISTRIBUTIONS = {
    "lossy": _lossy,
    "lenient": _lenient,
    "mentored": _mentored,
    "cactus": _cactus,
    "ears": _ears,
    "ensemble": _ensemble,
    "biased": _biased,
    "judge": _judge,
}

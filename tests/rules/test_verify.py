"""verify_block: against a plain walk with the same random numbers, by frequencies, and at its edges."""

from __future__ import annotations

import pytest
import reference
import torch
from instances import HEADS, build, instances, label, with_target

from deferral_train.errors import InputError
from deferral_train.rules import Origin, Summary, make_rule, summarize, verify_block
from deferral_train.rules.sampling import uniforms
from deferral_train.rules.verify import raise_fault
from deferral_train.testing import top_k

B, T, V = 24, 4, 7


def block(seed=0, rows=B, drafts=T, vocabulary=V, spread=1.2, dtype=torch.float64):
    """Near drafter and verifier logits, tokens drawn from the drafter."""
    generator = torch.Generator().manual_seed(seed)
    verifier = torch.randn(rows, drafts + 1, vocabulary, generator=generator, dtype=dtype) * 1.5
    drafter = verifier + torch.randn(rows, drafts + 1, vocabulary, generator=generator, dtype=dtype) * spread
    distribution = torch.softmax(drafter[:, :drafts].reshape(-1, vocabulary), dim=-1)
    drafted = torch.multinomial(distribution, 1, generator=generator).reshape(rows, drafts)
    return drafted, drafter, verifier


def pick(weights, uniform):
    """Inverse of the cumulative sum, in plain Python."""
    total, passed = sum(weights), 0.0
    for index, weight in enumerate(weights):
        passed += weight
        if weight > 0 and uniform * total < passed:
            return index
    return max(i for i, w in enumerate(weights) if w > 0)


def plain_walk(rule, drafted, drafter, verifier, numbers, last, temperature, bonus):
    """One row, one token at a time."""
    for t, x in enumerate(drafted):
        at = reference.Position(drafter[t], verifier[t], temperature)
        pi = reference.target(rule, at)
        ratio = 0.0 if pi[x] == 0 else 1.0 if pi[x] >= at.q[x] else pi[x] / at.q[x]
        if numbers[t] < ratio:
            continue
        excess = [max(0.0, b - a) for a, b in zip(at.q, pi)]
        return t, pick(excess if sum(excess) > 0 else pi, last)
    end = len(drafted)
    at = reference.Position(drafter[end], verifier[end], temperature)
    return end, pick(at.p if bonus == "verifier" else reference.target(rule, at), last)


PLAIN = [r for r in with_target() if r.name not in ("cactus", "judge") and r.stage == "verify"]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("rule", PLAIN[::2], ids=label)
def test_equals_a_plain_walk_with_the_same_numbers(rule, temperature):
    drafted, drafter, verifier = block(seed=3)
    checked = 4 if rule.name == "mentored" else B  # its reference bisects twice over
    for bonus in ("verifier", "exact"):
        numbers, last = uniforms(B, T, torch.Generator().manual_seed(9), verifier)
        verdict = verify_block(
            rule, drafted, drafter, verifier, temperature=temperature, bonus=bonus,
            generator=torch.Generator().manual_seed(9),
        )  # fmt: skip
        for b in range(checked):
            expected = plain_walk(
                rule, drafted[b].tolist(), drafter[b].tolist(), verifier[b].tolist(),
                numbers[b].tolist(), float(last[b]), temperature, bonus,
            )  # fmt: skip
            assert (int(verdict.accepted[b]), int(verdict.next_token[b])) == expected


@pytest.mark.parametrize("rule", with_target(), ids=label)
def test_first_token_frequencies_follow_the_target(rule, monkeypatch):
    """Chi-square over 20,000 rows of one drafted token; fails by chance for one rule in a million."""
    from scipy.stats import chi2

    rows, generator = 20_000, torch.Generator().manual_seed(5)
    verifier = torch.tensor([1.0, 0.2, -0.4, 0.7, -1.5], dtype=torch.float64)
    drafter = torch.tensor([0.1, 1.1, -0.9, 0.9, 0.0], dtype=torch.float64)
    expected = rule.target(drafter, verifier) * rows
    if rule.name == "mentored":
        # All rows share their distributions, and its search takes a thousand times longer than the rest.
        law = type(rule).law
        monkeypatch.setattr(
            type(rule), "law", lambda self, q, p, summary: law(self, q[:1], p[:1], summary).expand_as(q)
        )
    drafted = torch.multinomial(torch.softmax(drafter, -1).expand(rows, -1), 1, generator=generator)
    verdict = verify_block(
        rule, drafted, drafter.expand(rows, 1, -1), verifier.expand(rows, 2, -1), generator=generator
    )
    first = torch.where(verdict.accepted == 1, drafted[:, 0], verdict.next_token)
    counts = torch.bincount(first, minlength=5).double()
    assert bool((counts[expected == 0] == 0).all())
    live = expected > 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum()
    assert float(chi2.sf(float(statistic), int(live.sum()) - 1)) > 1e-6


@pytest.mark.parametrize("rule", with_target(), ids=label)
def test_greedy_draws_nothing_and_follows_the_target(rule):
    drafted, drafter, verifier = block(seed=1)
    drafted = drafter[:, :T].argmax(-1)
    generator = torch.Generator().manual_seed(2)
    before = generator.get_state()
    verdict = verify_block(rule, drafted, drafter, verifier, temperature=0.0, generator=generator)
    assert torch.equal(generator.get_state(), before)
    emitted = rule.target(drafter[:, :T], verifier[:, :T], 0.0).argmax(-1)
    stands = (emitted == drafted).long().cumprod(1)
    assert torch.equal(verdict.accepted, stands.sum(1))
    for b in range(B):
        t = int(verdict.accepted[b])
        expected = emitted[b, t] if t < T else verifier[b, T].argmax()
        assert int(verdict.next_token[b]) == int(expected)


@pytest.mark.parametrize("name", ["lossless", "opt", "token_v3", "lossy", "judge"])
def test_origins_account_for_every_token(name):
    rule = build(
        name, {} if name == "lossless" else {"threshold": 0.4} if name == "judge" else {"alpha": 0.3}
    )
    drafted, drafter, verifier = block(seed=8)
    lengths = torch.arange(B) % (T + 1)
    verdict = verify_block(rule, drafted, drafter, verifier, lengths=lengths)
    assert bool((verdict.accepted <= lengths).all())
    for b in range(B):
        n = int(verdict.accepted[b])
        origins = verdict.origin[b].tolist()
        assert set(origins[:n]) <= {Origin.KEPT, Origin.ACCEPTED}
        assert origins[n] == (Origin.BONUS if n == lengths[b] else Origin.RESAMPLED)
        assert set(origins[n + 1 :]) <= {Origin.NONE}
        if name == "lossless":
            assert Origin.KEPT not in origins
    if name != "lossless":
        assert bool((verdict.origin == Origin.KEPT).any())
    outside = torch.arange(T) >= lengths.unsqueeze(1)
    assert not bool(verdict.deferred[outside].any())


def test_deferred_is_the_decision():
    drafted, drafter, verifier = block(seed=4)
    rule = make_rule("opt", alpha=0.1)
    verdict = verify_block(rule, drafted, drafter, verifier)
    assert torch.equal(verdict.deferred, rule.defer(summarize(drafter[:, :T], verifier[:, :T])))
    assert bool(verify_block(make_rule("lossless"), drafted, drafter, verifier).deferred.all())
    assert not bool(verify_block(make_rule("drafter_only"), drafted, drafter, verifier).deferred.any())


def test_drafter_only_emits_the_draft_and_withheld_bonus_is_minus_one():
    drafted, drafter, verifier = block(seed=4)
    verdict = verify_block(make_rule("drafter_only"), drafted, drafter, verifier, bonus="none")
    assert verdict.accepted.tolist() == [T] * B
    assert verdict.next_token.tolist() == [-1] * B
    assert bool((verdict.origin[:, T] == Origin.NONE).all())


def test_lossless_ends_draw_the_same_tokens_as_lossless():
    drafted, drafter, verifier = block(seed=6, dtype=torch.float32)

    def run(rule):
        return verify_block(rule, drafted, drafter, verifier, generator=torch.Generator().manual_seed(1))

    expected = run(make_rule("lossless"))
    ends = [
        r.with_dial(r.dial.lossless)
        for r in instances()
        if r.dial is not None and r.dial.lossless is not None
    ]
    assert len({end.name for end in ends}) >= 14
    for end in ends:
        verdict = run(end)
        assert torch.equal(verdict.accepted, expected.accepted), end.name
        assert torch.equal(verdict.next_token, expected.next_token), end.name
        assert torch.equal(verdict.origin, expected.origin), end.name


def test_masked_tokens_are_never_emitted_whatever_is_kept():
    drafted, drafter, verifier = block(seed=7, rows=400)
    sampling = top_k(verifier, 3)
    for name in ("drafter_only", "token_v3", "ensemble", "lossless"):
        rule = make_rule(name, **({"alpha": 1.0} if name == "token_v3" else {}))
        for temperature in (0.0, 1.0):
            proposals = drafter[:, :T].argmax(-1) if temperature == 0 else drafted
            verdict = verify_block(
                rule, proposals, drafter, verifier, temperature=temperature, verifier_sampling_logits=sampling,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            for b in range(400):
                n = int(verdict.accepted[b])
                tokens = [*proposals[b, :n].tolist(), int(verdict.next_token[b])]
                assert all(sampling[b, t, x] > -torch.inf for t, x in enumerate(tokens))


def test_rows_beyond_their_length_may_hold_anything():
    drafted, drafter, verifier = block(seed=2)
    lengths = torch.full((B,), 2)
    generator = torch.Generator().manual_seed(3)
    expected = verify_block(
        make_rule("opt"), drafted, drafter, verifier, lengths=lengths, generator=generator
    )
    drafted[:, 2:] = -1
    drafter[:, 2:] = torch.nan
    verifier[:, 3:] = torch.nan
    generator = torch.Generator().manual_seed(3)
    verdict = verify_block(make_rule("opt"), drafted, drafter, verifier, lengths=lengths, generator=generator)
    assert torch.equal(verdict.next_token, expected.next_token)
    assert torch.equal(verdict.accepted, expected.accepted)


def test_an_empty_block_emits_the_verifiers_token():
    verifier = torch.randn(3, 1, V)
    verdict = verify_block(
        make_rule("opt"), torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 0, V), verifier, temperature=0.0
    )
    assert verdict.accepted.tolist() == [0, 0, 0]
    assert torch.equal(verdict.next_token, verifier[:, 0].argmax(-1))


def test_one_hot_proposals():
    """A draft without a distribution is a point mass: accepted with probability pi(x), here p(x)."""
    rows = 20_000
    verifier = torch.tensor([1.0, 0.0, -1.0]).expand(rows, 2, -1)
    drafted = torch.ones(rows, 1, dtype=torch.long)
    verdict = verify_block(
        make_rule("lossless"), drafted, None, verifier, generator=torch.Generator().manual_seed(1)
    )
    first = torch.where(verdict.accepted == 1, drafted[:, 0], verdict.next_token)
    p = torch.softmax(verifier[0, 0], -1)
    assert abs(float(verdict.accepted.double().mean()) - float(p[1])) < 0.02
    torch.testing.assert_close(torch.bincount(first).double() / rows, p.double(), atol=0.02, rtol=0)
    for rule in instances():
        if rule.reads_drafter_confidence and not rule.is_lossless:
            with pytest.raises(InputError, match=f"rule {rule.name}: .*confidence"):
                verify_block(rule, drafted[:4], None, verifier[:4])
        else:
            verify_block(rule, drafted[:4], None, verifier[:4])


def test_request_limit_zero_is_lossless_and_large_is_the_rule():
    drafted, drafter, verifier = block(seed=12)
    for rule in (
        make_rule("opt", alpha=0.5),
        make_rule("token_v3", alpha=0.8),
        make_rule("lossy", alpha=0.7),
    ):

        def run(rule=rule, **limits):
            generator = torch.Generator().manual_seed(4)
            return verify_block(rule, drafted, drafter, verifier, generator=generator, **limits)

        lossless = run(make_rule("lossless"))
        stopped = run(max_request_loss=0.0)
        assert torch.equal(stopped.accepted, lossless.accepted)
        assert torch.equal(stopped.next_token, lossless.next_token)
        assert stopped.spent.tolist() == [0.0] * B
        assert not bool((stopped.origin == Origin.KEPT).any())
        free = run(max_request_loss=1e9)
        assert torch.equal(free.accepted, run().accepted)
        assert torch.equal(free.next_token, run().next_token)


def test_request_limit_by_hand():
    """Costs .3, .3, .3 under a limit of .7: two tokens are kept, the third is executed losslessly."""
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    q = torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64).log()
    drafter, verifier = q.expand(1, 3, 3), p.expand(1, 4, 3)
    drafted = torch.ones(1, 3, dtype=torch.long)
    rule = make_rule("drafter_only")
    verdict = verify_block(rule, drafted, drafter, verifier, temperature=0.0, max_request_loss=0.7)
    assert verdict.accepted.tolist() == [2]
    assert verdict.next_token.tolist() == [0]
    assert verdict.spent.tolist() == pytest.approx([0.6])
    assert verdict.origin[0].tolist() == [Origin.KEPT, Origin.KEPT, Origin.RESAMPLED, Origin.NONE]
    later = verify_block(
        rule, drafted, drafter, verifier, temperature=0.0, max_request_loss=0.7, spent=verdict.spent
    )
    assert later.accepted.tolist() == [0]
    assert later.spent.tolist() == pytest.approx([0.6])


def test_request_limit_is_never_overspent():
    drafted, drafter, verifier = block(seed=13, rows=200)
    rule = make_rule("learned", head=HEADS["learned"], alpha=0.5)
    spent, generator = torch.zeros(200, dtype=torch.float64), torch.Generator().manual_seed(1)
    for _ in range(5):
        verdict = verify_block(
            rule, drafted, drafter, verifier, max_request_loss=0.35, spent=spent, generator=generator
        )
        assert bool((verdict.spent >= spent).all())
        assert bool((verdict.spent <= 0.35).all())
        spent = verdict.spent
    assert bool((spent > 0).any())


def test_bad_blocks_are_refused_by_name():
    drafted, drafter, verifier = block()
    rule = make_rule("opt")

    def refused(match, **changes):
        given = {"drafted": drafted, "drafter_logits": drafter, "verifier_logits": verifier, **changes}
        with pytest.raises(InputError, match=f"rule opt: .*{match}"):
            verify_block(
                rule, given.pop("drafted"), given.pop("drafter_logits"), given.pop("verifier_logits"), **given
            )

    def spoiled(logits, value):
        logits = logits.clone()
        logits[2, 1, 3] = value
        return logits

    refused("drafter_logits has NaN", drafter_logits=spoiled(drafter, torch.nan))
    refused("verifier_logits has NaN", verifier_logits=spoiled(verifier, torch.inf))
    refused("vocabularies differ", drafter_logits=drafter[..., :-1])
    refused("verifier_logits has shape", verifier_logits=verifier[:, :T])
    refused("drafter_logits has shape", drafter_logits=drafter[:, : T - 1])
    refused("ids outside the vocabulary", drafted=drafted + V)
    refused("drafted must be", drafted=drafted.float())
    refused("lengths", lengths=torch.full((B,), T + 1))
    refused("lengths has shape", lengths=torch.tensor([T]))
    refused("bonus", bonus="both")
    refused(
        "T\\+1 rows", bonus="exact", drafter_logits=drafter[:, :T], lengths=torch.zeros(B, dtype=torch.long)
    )
    refused("max_request_loss", max_request_loss=-1.0)
    refused("spent", max_request_loss=1.0, spent=torch.zeros(2))
    refused("temperature", temperature=float("nan"))
    refused("probability 0", drafter_logits=_forbid(drafter, drafted))
    refused("leading shape", context=Summary({"position": torch.zeros(B)}))


def test_a_fault_travels_in_the_verdict_and_is_raised_on_the_host():
    drafted, drafter, verifier = block()
    rule = make_rule("opt")
    fine = verify_block(rule, drafted, drafter, verifier, check=False)
    assert fine.fault.tolist() == [0] * B
    raise_fault(rule, fine.fault.tolist())
    with pytest.raises(InputError, match="rule opt: row 1: drafter_logits has NaN"):
        raise_fault(rule, [0, 1, 0])


def test_greedy_and_lossless_names_the_fault_though_the_drafter_is_not_read():
    drafted, drafter, verifier = block()
    rule = make_rule("lossless")
    outside = drafted.clone()
    outside[1, 0] = drafter.shape[-1]
    with pytest.raises(InputError, match="row 1: drafted holds ids outside the vocabulary"):
        verify_block(rule, outside, drafter, verifier, temperature=0.0)
    broken = verifier.clone()
    broken[2, 1, 0] = torch.nan
    with pytest.raises(InputError, match="row 2: verifier_logits has NaN"):
        verify_block(rule, drafted, drafter, broken, temperature=0.0)


def _forbid(drafter, drafted):
    drafter = drafter.clone()
    drafter[0, 0, drafted[0, 0]] = -torch.inf
    return drafter


def test_a_missing_context_field_is_named():
    class Hidden:
        features = ("verifier_hidden",)
        stage = "verify"

        def gap(self, summary):
            return summary.verifier_hidden.mean(-1)

    drafted, drafter, verifier = block()
    rule = make_rule("learned", head=Hidden())
    with pytest.raises(InputError, match="rule learned: context lacks verifier_hidden"):
        verify_block(rule, drafted, drafter, verifier)
    context = Summary({"verifier_hidden": torch.randn(B, T, 5)})
    verdict = verify_block(rule, drafted, drafter, verifier, context=context)
    tv = summarize(drafter[:, :T], verifier[:, :T], fields=["tv"]).tv
    assert torch.equal(verdict.deferred, context.verifier_hidden.mean(-1) > 0.1 * tv)


def test_the_place_in_the_block_is_always_known():
    class ByPlace:
        features = ("draft_position",)
        stage = "verify"

        def gap(self, summary):
            return summary.draft_position.double() * 10 - 15

    drafted, drafter, verifier = block()
    verdict = verify_block(make_rule("learned", head=ByPlace()), drafted, drafter, verifier)
    assert verdict.deferred.tolist() == [[False, False, True, True]] * B


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_empty_block_under_a_limit_gives_a_bonus_and_spends_nothing(temperature):
    drafter, verifier = torch.randn(3, 0, 7), torch.randn(3, 1, 7)
    drafted = torch.empty(3, 0, dtype=torch.int64)
    rule = make_rule("opt", alpha=0.2)
    verdict = verify_block(rule, drafted, drafter, verifier, temperature=temperature, max_request_loss=0.5)
    assert verdict.accepted.tolist() == [0, 0, 0]
    assert (verdict.next_token >= 0).all()
    assert verdict.spent is not None
    assert verdict.spent.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_empty_block_without_a_bonus_emits_nothing(temperature):
    drafted, verifier = torch.empty(3, 0, dtype=torch.int64), torch.randn(3, 0, 7)
    for logits in (torch.randn(3, 0, 7), None):
        verdict = verify_block(
            make_rule("token_v3"), drafted, logits, verifier, temperature=temperature, bonus="none"
        )
        assert verdict.accepted.tolist() == [0, 0, 0]
        assert verdict.next_token.tolist() == [-1, -1, -1]
        assert verdict.origin.tolist() == [[0], [0], [0]]


def test_random_numbers_of_the_callers_own_stand_in_for_the_generators():
    drafted, drafter, verifier = block()
    numbers = torch.rand(B, T + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    own = verify_block(make_rule("opt", alpha=0.1), drafted, drafter, verifier, numbers=numbers)
    drawn = verify_block(
        make_rule("opt", alpha=0.1), drafted, drafter, verifier, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(own.accepted, drawn.accepted)
    assert torch.equal(own.next_token, drawn.next_token)
    with pytest.raises(InputError, match=rf"numbers has shape .* it must be \[{B}, {T + 1}\]"):
        verify_block(make_rule("opt", alpha=0.1), drafted, drafter, verifier, numbers=numbers[:, :T])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_a_bonus_the_verifiers_last_row_may_be_left_out(temperature):
    drafted, drafter, verifier = block()
    rule = make_rule("token_v3", alpha=0.4)
    numbers = torch.rand(B, T + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    settings = {"temperature": temperature, "numbers": numbers, "bonus": "none"}
    whole = verify_block(rule, drafted, drafter, verifier, **settings)
    short = verify_block(rule, drafted, drafter[:, :T], verifier[:, :T], **settings)
    assert torch.equal(whole.origin, short.origin)
    assert torch.equal(whole.next_token, short.next_token)
    with pytest.raises(InputError, match="a bonus needs T\\+1"):
        verify_block(rule, drafted, drafter, verifier[:, :T])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "rule", [rule for rule in instances() if rule.dial_axes is not None and not rule.is_lossless], ids=label
)
def test_rows_with_dials_and_limits_of_their_own_are_verified_as_each_would_be_alone(rule, temperature):
    generator = torch.Generator().manual_seed(11)
    rows, drafts, size = 24, 4, 13
    logits = torch.randn(2, rows, drafts + 1, size, generator=generator)
    logits[0] = logits[1] + 0.8 * logits[0]
    drafted = (logits[0, :, :drafts] / (temperature or 1e-3)).softmax(-1).flatten(0, 1)
    drafted = drafted.multinomial(1, generator=generator).view(rows, drafts)
    low, high = (rule.dial.low, rule.dial.high) if rule.dial.sweep is None else rule.dial.sweep
    dials = [low + (high - low) * (1 + row % 8) / 10 for row in range(rows)]
    limits = torch.tensor([(1e9, 0.0, 0.3)[row % 3] for row in range(rows)], dtype=torch.float64)
    numbers = torch.rand(rows, drafts + 1, generator=generator, dtype=torch.float64)
    settings = {"temperature": temperature, "numbers": None if temperature == 0 else numbers}
    together = verify_block(
        rule.with_dials(torch.tensor(dials)), drafted, logits[0, :, :drafts], logits[1],
        max_request_loss=limits, **settings,
    )  # fmt: skip
    seen = set()
    for row in range(rows):
        one = slice(row, row + 1)
        alone = verify_block(
            rule.with_dial(dials[row]), drafted[one], logits[0, one, :drafts], logits[1, one],
            max_request_loss=float(limits[row]), **{**settings, "numbers": None if temperature == 0 else numbers[one]},
        )  # fmt: skip
        for name in ("accepted", "next_token", "kept", "deferred", "origin", "fault"):
            assert torch.equal(getattr(together, name)[one], getattr(alone, name)), (name, row)
        torch.testing.assert_close(together.spent[one], alone.spent)
        seen.add(int(alone.kept.sum()))
    assert len(seen) > 1  # the dials matter


def test_limits_of_another_shape_and_dials_of_a_rule_that_takes_one_are_refused():
    logits = torch.randn(2, 3, 3, 5)
    drafted = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(
        InputError, match=r"max_request_loss has shape \[2\]; pass one number, or one per row, \[3\]"
    ):
        verify_block(make_rule("opt"), drafted, logits[0, :, :2], logits[1], max_request_loss=torch.zeros(2))
    with pytest.raises(InputError, match="rule lossy takes one dial for all rows"):
        make_rule("lossy").with_dials(torch.zeros(3))

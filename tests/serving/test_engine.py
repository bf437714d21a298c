"""The real engine on the CPU: identical greedy output, exact sampled distributions, per-request settings.

A chi-square test fails by chance with probability at most FAILURE; there are fewer than 20 of them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from engines import (
    DRAFTS,
    VOCABULARY,
    always_busy,
    counts,
    drafted_and_accepted,
    exact_logits,
    generate,
    loop,
    prompts,
    save_pair,
    start,
    stop,
    use,
)

from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead, GapHead, TokenGapHead
from deferral_train.heads.folding import folded
from deferral_train.heads.rules import learned_rule
from deferral_train.rules import RULES, make_rule
from deferral_train.serving.checks import check_engine
from deferral_train.serving.config import ServingConfig

pytestmark = pytest.mark.engine
FAILURE = 1e-7
LOSSLESS_ENDS = {
    name: f"{name}:{rule.dial.parameter}={rule.dial.lossless:g}"
    for name, rule in RULES.items()
    if rule.dial is not None and rule.dial.lossless is not None and name not in ("judge", "csd")
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def plain(pair):
    """What the verifier alone says, greedily: no speculation, no plug-in."""
    llm = start(pair, drafter=None)
    try:
        return generate(llm, prompts(24))
    finally:
        stop(llm)


@pytest.fixture(scope="module")
def llm(pair, plain):
    engine = start(pair, {"rule": "opt:alpha=0.2"})
    yield engine
    stop(engine)


@pytest.mark.parametrize("name", LOSSLESS_ENDS)
def test_at_its_lossless_end_every_rule_gives_the_verifiers_own_text(llm, plain, name):
    seam = use(llm, rule=LOSSLESS_ENDS[name])
    assert generate(llm, prompts(24)) == plain
    assert counts(seam)["engine_steps"] > 0  # no row has a rule: the engine's own code
    # With a neighbour that has one, the same rows go through our verdicts.
    mixed = use(llm, rule="drafter_only")
    others = prompts(8, seed=5)
    extra = [{"deferral_lossless": True}] * 24 + [None] * 8
    assert generate(llm, prompts(24) + others, extra)[:24] == plain
    assert counts(mixed)["steps"] > 0
    assert counts(mixed)["kept"] > 0


def test_lossless_rows_in_our_own_verdicts_are_identical_too(llm, plain):
    """Every rule's lossless end as the rule of the row itself, forced through our verdict."""
    for spec in LOSSLESS_ENDS.values():
        seam = use(llm, rule=spec)
        seam.requests.of = always_busy(seam.requests.of)
        assert generate(llm, prompts(24)) == plain, spec
        assert counts(seam)["engine_steps"] == 0
        assert counts(seam)["steps"] > 0


def test_a_rule_in_force_changes_the_text_and_metrics_of_engine_and_plug_in_agree(llm, plain):
    seam = use(llm, rule="drafter_only")
    before = drafted_and_accepted(llm)
    assert generate(llm, prompts(24)) != plain
    after = drafted_and_accepted(llm)
    found = counts(seam)
    assert found["kept"] == found["drafted"] > 0
    assert found["rejected"] == found["discarded"] == 0
    assert after[0] - before[0] == found["drafted"]
    assert after[1] - before[1] <= found["kept"]  # the engine counts what fits the request's length


def sampled_distributions(llm, pair, count=160, tokens=21, temperature=1.0, **sampling):
    """Tokens [N, L] sampled after one prompt and both models' logits where each was drawn [N, L, V]."""
    prompt = [2, 5, 6, 7]
    found = []
    for _ in range(4):
        found += generate(llm, [prompt] * count, max_tokens=tokens, temperature=temperature, **sampling)
    drafter, verifier = exact_logits(pair, [prompt + row for row in found])
    at = slice(len(prompt) - 1, len(prompt) - 1 + tokens)
    return torch.tensor(found), drafter[:, at], verifier[:, at]


def p_value(distributions, tokens, drafter, verifier, at):
    from engines import uniformity

    order = (verifier - drafter)[:, at].argsort(-1)  # what a wrong mixture of the two would shift
    size = distributions.shape[-1]
    return uniformity(
        distributions[:, at].reshape(-1, size), tokens[:, at].reshape(-1), order.reshape(-1, size)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("spec", ["opt:alpha=0.1", "token_v3:alpha=0.3", "lossy:alpha=0.4"])
def test_sampled_tokens_follow_p_first_and_pi_where_drafted(llm, pair, spec, temperature):
    use(llm, rule=spec)
    tokens, drafter, verifier = sampled_distributions(llm, pair, tokens=DRAFTS + 1, temperature=temperature)
    p = (verifier / temperature).softmax(-1)
    name, _, value = spec.partition(":alpha=")
    pi = make_rule(name, alpha=float(value)).target(drafter, verifier, temperature)
    first, rest = slice(0, 1), slice(1, DRAFTS + 1)  # the first comes from the prompt's own pass
    assert p_value(p, tokens, drafter, verifier, first) > FAILURE
    assert p_value(pi, tokens, drafter, verifier, rest) > FAILURE
    assert (
        p_value(p, tokens, drafter, verifier, rest) < FAILURE
    )  # the test can tell: not the verifier's distribution
    assert p_value((drafter / temperature).softmax(-1), tokens, drafter, verifier, rest) < FAILURE


def test_lossless_sampling_follows_p_everywhere(llm, pair):
    seam = use(llm, rule="lossless")
    tokens, drafter, verifier = sampled_distributions(llm, pair)
    assert p_value(verifier.softmax(-1), tokens, drafter, verifier, slice(0, 21)) > FAILURE
    assert counts(seam)["accepted"] > 0
    assert counts(seam)["rejected"] > 0


def test_bonus_tokens_follow_p_between_drafted_ones_that_follow_q(llm, pair):
    use(llm, rule="drafter_only")
    tokens, drafter, verifier = sampled_distributions(llm, pair)
    # prefill, then whole blocks: DRAFTS tokens and a bonus
    bonus = torch.arange(0, 21, DRAFTS + 1)
    drafted = torch.tensor([t for t in range(21) if t % (DRAFTS + 1)])
    p, q = verifier.softmax(-1), drafter.softmax(-1)
    assert p_value(p, tokens, drafter, verifier, bonus) > FAILURE
    assert p_value(q, tokens, drafter, verifier, drafted) > FAILURE
    assert p_value(q, tokens, drafter, verifier, bonus) < FAILURE


def test_truncation_holds_for_drafted_tokens(llm, pair):
    use(llm, rule="opt:alpha=0.2")
    tokens, drafter, verifier = sampled_distributions(llm, pair, count=60, top_k=3)
    allowed = verifier.topk(4, dim=-1).indices  # one more than three: a tie of float32 may go either way
    assert (allowed == tokens[..., None]).any(-1).all()
    kept = verifier.masked_fill(verifier < verifier.topk(3, dim=-1).values[..., -1:], -torch.inf)
    pi = make_rule("opt", alpha=0.2).target(
        drafter, verifier, drafter_sampling_logits=drafter, verifier_sampling_logits=kept
    )
    assert p_value(pi, tokens, drafter, verifier, slice(1, DRAFTS + 1)) > FAILURE


@pytest.mark.parametrize("spec", ["opt:alpha=0.2", "token_v3:alpha=0.5", "lossless"])
def test_loop_and_engine_say_the_same_greedily_and_accept_alike_when_sampling(llm, pair, spec):
    """Blocks begin at the same places: the loop starts from the engine's first token, which is not drafted."""
    name, _, value = spec.partition(":alpha=")
    rule = make_rule(name, **({"alpha": float(value)} if value else {}))
    rows = prompts(160, seed=6, shortest=6, longest=6)
    use(llm, rule=spec)
    said = generate(llm, rows[:24])
    from_first = [row + text[:1] for row, text in zip(rows, said)]
    # Longer than is compared: the loop cuts its last block at the limit, the engine runs over it.
    ours = loop(pair, rule, from_first, 23 + DRAFTS + 1, 0.0).sequences[:, 7:30].tolist()
    assert ours == [text[1:] for text in said]

    seam = use(llm, rule=spec)
    seam.requests.of = always_busy(seam.requests.of)
    said = generate(llm, rows, temperature=1.0, max_tokens=48)
    reached, passed = (torch.tensor(seam.counters.places(which))[:DRAFTS] for which in ("reached", "passed"))
    stats = loop(pair, rule, [row + text[:1] for row, text in zip(rows, said)], 47, 1.0).stats
    decided, accepted = stats.positions["decided"].double(), stats.positions["accepted"].double()
    for place in range(DRAFTS):
        both = (passed[place] + accepted[place]) / (reached[place] + decided[place])
        error = (both * (1 - both) * (1 / reached[place] + 1 / decided[place])) ** 0.5
        difference = passed[place] / reached[place] - accepted[place] / decided[place]
        # Normal approximation: one of these 12 comparisons fails by chance with probability below 1e-6.
        assert abs(difference) < 5.5 * error, (place, difference, error)
        assert min(reached[place], decided[place]) > 300


class Remembering:
    """A head that decides by the tokens before a position, and always leaves the first to the verifier."""

    features = ("previous_token_1", "previous_token_2", "previous_token_3", "position", "draft_position")
    stage, metadata = "verify", {}

    def gap(self, summary):
        code = 5 * summary.previous_token_1 + 3 * summary.previous_token_2 + summary.previous_token_3
        return torch.where(summary.position == 0, 1.0, (code % 3 == 0).float()) - 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_previous_tokens_are_those_of_the_loop(llm, pair, temperature):
    rule = make_rule("learned", head=Remembering(), alpha=0.0)
    rows = prompts(120, seed=8, shortest=6, longest=6)
    drafter, verifier = exact_logits(pair, rows)
    # Where the two models' first tokens differ the loop's first block is the verifier's one token, as the engine's is.
    rows = [
        row for row, q, p in zip(rows, drafter[:, -1], verifier[:, -1]) if int(q.argmax()) != int(p.argmax())
    ]
    assert len(rows) > 20
    seam = use(llm, rule="opt:alpha=0.2")
    seam.adopt(seam.config, rule)
    if temperature == 0:
        ours = loop(pair, rule, rows, 24 + DRAFTS + 1, 0.0).sequences[:, 6:30].tolist()
        assert generate(llm, rows) == ours
        found = counts(seam)
        assert min(found["kept"], found["deferred"], found["rejected"]) > 50
        return
    seen = []
    seam.rule.head.gap = lambda summary: (seen.append(summary), Remembering.gap(rule.head, summary))[1]
    for row in rows[:6]:
        seen.clear()
        text = [-1, -1, -1, *generate(llm, [row], temperature=1.0)[0]]
        for summary in seen:
            at = int(summary.position.reshape(-1)[0])
            said = [int(summary[f"previous_token_{back}"].reshape(-1)[0]) for back in (1, 2, 3)]
            assert said == text[at : at + 3][::-1]  # before the block's first position: what was emitted
        assert len(seen) > 4


def looking_up(pair, kind, folder):
    """A head with look-up tables and the verifier's hidden state, folded, as it comes back from its folder."""
    from transformers import LlamaForCausalLM

    matrix = LlamaForCausalLM.from_pretrained(pair / "verifier").get_output_embeddings().weight.detach()
    widths = {"vocabulary": VOCABULARY, "matrix": matrix.shape[1], "verifier_hidden": matrix.shape[1]}
    shared = ("verifier_margin", "drafter_margin", "verifier_hidden", "verifier_entropy")
    if kind == "token_gap":
        head = TokenGapHead(
            (*shared, "token_embedding"), loss="sequence_sampled", body="linear", widths=widths
        )
    else:
        argmaxes = ("drafter_argmax_embedding", "verifier_argmax_embedding", "argmax_cosine")
        head = GapHead((*shared, *argmaxes), loss="sequence", body="linear", widths=widths)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    head.inputs.lookups.set_matrix(matrix)
    folded(head).save_pretrained(folder)
    return DeferralHead.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["gap", "token_gap"])
def test_a_head_that_looks_tokens_up_decides_as_in_the_loop(llm, pair, tmp_path, kind):
    """On equal prefixes: the loop starts from the engine's first token, and both write the same text."""
    head = looking_up(pair, kind, tmp_path)
    assert any(name.endswith("_worth") for name, _ in head.inputs.lookups.named_buffers())
    rows = prompts(24, seed=6, shortest=6, longest=6)
    texts = []
    for alpha in (-0.4, 0.0, 0.4):
        rule = learned_rule(head, alpha)
        seam = use(llm, rule="opt:alpha=0.2")
        seam.adopt(seam.config, rule)
        said = generate(llm, rows)
        found = counts(seam)
        from_first = [row + text[:1] for row, text in zip(rows, said)]
        ours = loop(pair, rule, from_first, 23 + DRAFTS + 1, 0.0).sequences[:, 7:30].tolist()
        assert ours == [text[1:] for text in said]
        texts.append((said, found["kept"], found["deferred"]))
    assert texts[0][0] != texts[2][0]
    assert texts[0][1] < texts[2][1]  # the more lenient, the more is kept
    assert min(texts[1][1:]) > 20


def test_a_seed_fixes_a_request_whoever_its_neighbours_are(llm):
    for spec in ("opt:alpha=0.2", "lossless"):
        use(llm, rule=spec)
        prompt = [2, 9, 8]
        alone = generate(llm, [prompt], temperature=1.0, seed=11)[0]
        assert generate(llm, [prompt], temperature=1.0, seed=11)[0] == alone
        assert generate(llm, [prompt], temperature=1.0, seed=12)[0] != alone
        assert generate(llm, [*prompts(6, seed=3), prompt], temperature=1.0, seed=11)[-1] == alone


def test_seeded_drafts_follow_q_and_seeded_text_follows_pi(llm, pair):
    from vllm import SamplingParams

    use(llm, rule="opt:alpha=0.1")
    prompt, count = [2, 5, 6, 7], 600
    params = [
        SamplingParams(temperature=1.0, max_tokens=DRAFTS + 1, ignore_eos=True, seed=number)
        for number in range(count)
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * count, params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    drafter, verifier = exact_logits(pair, [prompt + row for row in tokens])
    at = slice(len(prompt) - 1, len(prompt) + DRAFTS)
    drafter, verifier, tokens = drafter[:, at], verifier[:, at], torch.tensor(tokens)
    pi = make_rule("opt", alpha=0.1).target(drafter, verifier)
    assert p_value(pi, tokens, drafter, verifier, slice(1, DRAFTS + 1)) > FAILURE
    assert p_value(verifier.softmax(-1), tokens, drafter, verifier, slice(0, 1)) > FAILURE


def test_a_greedy_row_does_not_depend_on_its_neighbours(llm):
    seam = use(llm, rule="opt:alpha=0.2")
    from vllm import SamplingParams

    alone = generate(llm, prompts(12))
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    random = SamplingParams(temperature=1, max_tokens=24, ignore_eos=True)
    rows = [{"prompt_token_ids": ids} for ids in prompts(12) + prompts(12, seed=4)]
    outputs = llm.generate(rows, [greedy] * 12 + [random] * 12, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs[:12]] == alone
    assert counts(seam)["deferred"] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_settings_of_a_request_its_dial_lossless_and_its_limit(llm, plain, temperature):
    seam = use(llm, rule="opt:alpha=0.0")
    asked = prompts(24)
    if temperature == 0:
        assert generate(llm, asked, {"deferral_lossless": 1}) == plain
        assert generate(llm, asked, {"deferral_max_request_loss": 0.0}) == plain
    bold = use(llm, rule="opt:alpha=0.0")
    generate(llm, asked, {"deferral_dial": 5.0}, temperature=temperature)
    assert counts(bold)["rejected"] == 0 < counts(bold)["kept"]
    free = counts(bold)["estimated_loss"] / 24
    seam = use(llm, rule="opt:alpha=0.0")
    limit = free / 3
    extra = {"deferral_dial": 5.0, "deferral_max_request_loss": limit}
    generate(llm, asked, extra, temperature=temperature)
    assert 0 < counts(seam)["estimated_loss"] <= 24 * limit
    assert counts(seam)["kept"] < counts(seam)["drafted"]
    assert counts(seam)["refused_options"] == 0


def test_a_request_that_asks_for_nonsense_is_refused_when_admitted(llm):
    from vllm.exceptions import VLLMValidationError

    for extra, line in (
        ({"deferral_speed": 3}, "deferral_speed is unknown"),
        ({"deferral_max_request_loss": -1}, "use a number >= 0"),
        ({"deferral_dial": "x"}, "use a finite number"),
    ):
        with pytest.raises(VLLMValidationError, match=line):
            generate(llm, prompts(1), extra)
    assert len(generate(llm, prompts(1))[0]) == 24  # and the engine lives


def test_log_probabilities_are_the_verifiers(llm, pair):
    from vllm import SamplingParams

    use(llm, rule="opt:alpha=0.2")
    prompt = [2, 5, 6, 7]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
    _, verifier = exact_logits(pair, [prompt + list(output.token_ids)])
    expected = verifier[0, 3:-1].log_softmax(-1)
    assert len(output.logprobs) == 12
    for place, (token, given) in enumerate(zip(output.token_ids, output.logprobs)):
        assert given[token].logprob == pytest.approx(float(expected[place, token]), abs=1e-4)


def test_a_choice_of_tokens_is_kept_to(llm):
    seam = use(llm, rule="drafter_only")
    tokens = generate(llm, prompts(12), allowed_token_ids=[9, 10, 11], temperature=1.0)
    assert {token for row in tokens for token in row} <= {9, 10, 11}
    assert counts(seam)["rejected"] > 0  # the drafter knows nothing of it


def test_shadow_serves_lossless_and_counts_what_the_rule_would_do(llm, plain):
    seam = use(llm, rule="drafter_only", mode="shadow")
    assert generate(llm, prompts(24)) == plain
    found = counts(seam)
    assert found["kept"] == 0
    assert found["rejected"] > 0
    assert found["shadow_kept"] == found["shadow_drafted"] == found["drafted"] > 0
    assert found["shadow_estimated_loss"] > 0


def test_a_fully_lenient_rule_accepts_every_draft_at_any_temperature(llm):
    for spec in ("drafter_only", "token_v3:alpha=1"):
        for temperature in (0.0, 1.0):
            seam = use(llm, rule=spec)
            generate(llm, prompts(24), temperature=temperature)
            found = counts(seam)
            assert found["kept"] + found["accepted"] == found["drafted"] > 0


def test_requests_are_forgotten_and_the_engines_proposals_do_not_linger(llm):
    seam = use(llm, rule="opt:alpha=0.2")
    generate(llm, prompts(24))
    generate(llm, prompts(1))
    assert len(seam.requests) <= 1
    assert counts(seam)["requests"] == 25
    assert counts(seam)["refused_drafter_law"] == 0
    assert counts(seam)["refused_fault"] == 0


def test_the_other_runner_is_refused_by_the_name_of_its_switch(llm):
    config = copy.copy(llm.llm_engine.vllm_config)
    assert not config.use_v2_model_runner
    other = type("V2", (type(config),), {"use_v2_model_runner": True})
    config.__class__ = other
    with pytest.raises(InputError, match="start with VLLM_USE_V2_MODEL_RUNNER=0"):
        check_engine(config, ServingConfig(rule="opt:alpha=0.2"))

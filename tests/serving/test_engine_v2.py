"""The real engine with its V2 runner, its kernels interpreted on the CPU: make test-vllm starts this process.

References are the models themselves by transformers, and this project's own loop, which the V1 tests are held against
too. A chi-square test fails by chance with probability at most FAILURE; there are fewer than 20 of them.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import (
    DRAFTS,
    VOCABULARY,
    Remembering,
    check_rows,
    counts,
    drafted_and_accepted,
    exact_logits,
    generate,
    greedy_text,
    lossless_ends,
    p_value,
    preemptions,
    prompts,
    remembering,
    runner_of,
    save_pair,
    start,
    stop,
    use,
)

from deferral_train.errors import InputError
from deferral_train.rules import make_rule
from deferral_train.serving.blocks import RowSettings
from deferral_train.serving.checks import check_engine
from deferral_train.serving.config import LogConfig, ServingConfig
from deferral_train.serving.trace_log import TraceLog

pytestmark = [pytest.mark.engine, pytest.mark.v2]
FAILURE = 1e-7
ASKED = prompts(10)
LENGTH = 16
SAME = prompts(8, seed=6, shortest=6, longest=6)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def plain(pair):
    """What the verifier alone says, greedily, by transformers."""
    return greedy_text(pair, ASKED, LENGTH)


@pytest.fixture(scope="module")
def llm(pair):
    engine = start(pair, {"rule": "opt:alpha=0.2"})
    assert type(runner_of(engine).rejection_sampler).__name__ == "DeferralSamplerV2"
    yield engine
    stop(engine)


def say(llm, rows, *args, **settings):
    return generate(llm, rows, *args, **{"max_tokens": LENGTH, **settings})


def test_a_rule_at_its_lossless_end_leaves_every_row_to_the_engine(llm, plain):
    seam = use(llm, rule=next(iter(lossless_ends().values())))
    assert say(llm, ASKED) == plain
    assert counts(seam)["engine_steps"] > 0
    assert counts(seam)["steps"] == 0


def test_every_rule_at_its_lossless_end_gives_the_verifiers_own_text_in_our_verdicts(llm, plain):
    """All of them at once, a rule to each request."""
    rules = list(lossless_ends().values())
    seam = use(llm, rule="opt:alpha=0.0")
    seam.rules = seam.reads = lambda request: True
    admit = seam.requests.of
    made = iter(rules)

    def of(*arguments):
        request = admit(*arguments)
        request.settings = RowSettings(ServingConfig.parse({"rule": next(made)}).make_rule())
        return request

    seam.requests.of = of
    try:
        said = say(llm, [ASKED[number % len(ASKED)] for number in range(len(rules))])
    finally:
        del seam.rules, seam.reads
    for number, spec in enumerate(rules):
        assert said[number] == plain[number % len(ASKED)], spec
    found = counts(seam)
    assert next(made, None) is None
    assert found["engine_steps"] == 0
    assert min(found["accepted"], found["rejected"]) > 0


def test_a_rule_in_force_changes_the_text_and_metrics_of_engine_and_plug_in_agree(llm, plain):
    seam = use(llm, rule="drafter_only")
    before = drafted_and_accepted(llm)
    assert say(llm, ASKED) != plain
    after, found = drafted_and_accepted(llm), counts(seam)
    assert found["kept"] == found["drafted"] > 0
    assert found["rejected"] == found["discarded"] == 0
    assert after[0] - before[0] == found["drafted"]
    assert after[1] - before[1] <= found["kept"]  # the engine counts what fits the request's length
    assert found["requests"] == len(ASKED)
    assert found["refused_drafter_law"] == found["refused_fault"] == 0


def test_a_head_that_remembers_and_reads_positions_and_the_drafters_state(llm, pair):
    """Previous tokens and positions, and hidden states of both models, against the text that came out."""
    rule, seen = make_rule("learned", head=Remembering(), alpha=0.0), []
    seam = use(llm, rule="opt:alpha=0.2")
    seam.adopt(seam.config, rule)
    seam.hidden = {"drafter", "verifier"}
    context = seam._context

    def kept(members, index, drafted):
        found = context(members, index, drafted)
        seen.append((list(members.names), {name: column.clone() for name, column in found.items()}))
        return found

    seam._context = kept
    try:
        rows = SAME[:4]
        said = say(llm, rows, temperature=1.0)
    finally:
        del seam._context
    states = hidden_states(pair, [row + text for row, text in zip(rows, said)])
    checked = 0
    order = sorted({name for names, _ in seen for name in names}, key=lambda name: int(name.split("-")[0]))
    for names, found in seen:
        for place, name in enumerate(names):
            number = order.index(name)
            text = [-1, -1, -1, *said[number]]
            at = int(found["position"][place, 0])
            if at >= LENGTH:
                continue
            previous = [int(found[f"previous_token_{back}"][place, 0]) for back in (1, 2, 3)]
            assert previous == text[at : at + 3][::-1]
            for role in ("drafter", "verifier"):
                expected = states[role][number, len(rows[number]) - 1 + at]
                torch.testing.assert_close(found[f"{role}_hidden"][place, 0], expected, atol=2e-4, rtol=1e-3)
            checked += 1
    assert checked > 12


def hidden_states(pair, sequences):
    """Last hidden states of both models [N, L, D], as their heads get them."""
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return {
            role: LlamaForCausalLM.from_pretrained(pair / role).eval().model(torch.tensor(sequences)).last_hidden_state
            for role in ("drafter", "verifier")
        }  # fmt: skip


def sampled(llm, pair, count, tokens, temperature, **sampling):
    """Tokens [N, L] sampled after one prompt, and both models' logits where each was drawn [N, L, V]."""
    prompt = [2, 5, 6, 7]
    found = generate(llm, [prompt] * count, max_tokens=tokens, temperature=temperature, **sampling)
    drafter, verifier = exact_logits(pair, [prompt + row for row in found])
    at = slice(len(prompt) - 1, len(prompt) - 1 + tokens)
    return torch.tensor(found), drafter[:, at], verifier[:, at]


@pytest.mark.parametrize(
    "spec", ["opt:alpha=-0.2", pytest.param("token_v3:alpha=0.6", marks=pytest.mark.slow)]
)
def test_sampled_tokens_follow_p_first_and_pi_where_drafted(llm, pair, spec):
    use(llm, rule=spec)
    temperature, count = 0.7, 64
    tokens, drafter, verifier = sampled(llm, pair, count, DRAFTS + 1, temperature)
    p, q = (verifier / temperature).softmax(-1), (drafter / temperature).softmax(-1)
    name, _, value = spec.partition(":alpha=")
    pi = make_rule(name, alpha=float(value)).target(drafter, verifier, temperature)
    first, rest = slice(0, 1), slice(1, DRAFTS + 1)
    assert p_value(p, tokens, drafter, verifier, first) > FAILURE
    assert p_value(pi, tokens, drafter, verifier, rest) > FAILURE
    assert (
        max(p_value(other, tokens, drafter, verifier, rest) for other in (p, q)) < 1e-5
    )  # the test can tell


def test_drafted_tokens_follow_q_and_bonus_tokens_p(llm, pair):
    use(llm, rule="drafter_only")
    tokens, drafter, verifier = sampled(llm, pair, 48, 2 * (DRAFTS + 1) + 1, 1.0)
    bonus = torch.tensor([DRAFTS + 1, 2 * (DRAFTS + 1)])
    drafted = torch.tensor([t for t in range(2 * DRAFTS + 2) if t % (DRAFTS + 1)])
    p, q = verifier.softmax(-1), drafter.softmax(-1)
    assert p_value(p, tokens, drafter, verifier, bonus) > FAILURE
    assert p_value(q, tokens, drafter, verifier, drafted) > FAILURE
    assert p_value(p, tokens, drafter, verifier, drafted) < FAILURE


def test_truncation_and_a_choice_of_tokens_hold_for_drafted_tokens(llm, pair):
    seam = use(llm, rule="opt:alpha=0.2")
    tokens, _, verifier = sampled(llm, pair, 8, DRAFTS + 1, 0.8, top_k=3)
    allowed = verifier.topk(4, dim=-1).indices  # one more than three: a tie of float32 may go either way
    assert (allowed == tokens[..., None]).any(-1).all()
    assert counts(seam)["kept"] > 0
    seam = use(llm, rule="drafter_only")
    said = say(llm, ASKED[:4], allowed_token_ids=[9, 10, 11], temperature=1.0)
    assert {token for row in said for token in row} <= {9, 10, 11}
    assert counts(seam)["rejected"] > 0  # the drafter knows nothing of it


def test_a_seed_fixes_a_request_and_lossless_ones_are_the_engines_whoever_is_beside_them(llm):
    use(llm, rule="opt:alpha=0.2")
    prompt, sampling = [2, 9, 8], {"temperature": 1.0, "seed": 11}
    alone = say(llm, [prompt], **sampling)[0]
    assert say(llm, [*ASKED[:4], prompt], **sampling)[-1] == alone
    assert say(llm, [prompt], temperature=1.0, seed=12)[0] != alone
    lossless = {"deferral_lossless": 1}
    engines = say(llm, [prompt], lossless, **sampling)[0]
    assert say(llm, [*ASKED[:4], prompt], [None] * 4 + [lossless], **sampling)[-1] == engines


def test_log_probabilities_are_the_verifiers(llm, pair):
    from vllm import SamplingParams

    use(llm, rule="opt:alpha=0.2")
    prompt = [2, 5, 6, 7]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
    _, verifier = exact_logits(pair, [prompt + list(output.token_ids)])
    expected = verifier[0, 3:-1].log_softmax(-1)
    for place, (token, given) in enumerate(zip(output.token_ids, output.logprobs)):
        assert given[token].logprob == pytest.approx(float(expected[place, token]), abs=1e-4)


def test_shadow_serves_lossless_and_counts_what_the_rule_would_do(llm, plain):
    seam = use(llm, rule="drafter_only", mode="shadow")
    assert say(llm, ASKED) == plain
    found = counts(seam)
    assert found["kept"] == 0
    assert min(found["rejected"], found["accepted"]) > 0
    assert found["shadow_kept"] == found["shadow_drafted"] == found["drafted"] > 0
    assert found["shadow_estimated_loss"] > 0


def test_traces_are_those_of_the_models_over_the_text(llm, pair, tmp_path):
    """Logged requests with and without a rule; every row against both models run over what the engine gave."""
    from deferral_train.traces import open_traces

    seam = use(llm, rule="opt:alpha=0.2", log={"folder": str(tmp_path / "t"), "fraction": 1.0})
    log = ServingConfig(rule="opt:alpha=0.2", log=LogConfig(str(tmp_path / "t"), fraction=1.0))
    seam.logger = TraceLog(log, {"vocab_size": VOCABULARY, "tokenizer": "t", "dtype": {}}, seam.counters)
    asked = ASKED[:8]
    extra = [None, {"deferral_lossless": 1}] * 4
    try:
        begun = say(llm, asked[:1], {"deferral_lossless": 1})  # numbers of requests go on from here
        said = say(llm, asked, extra, temperature=1.0)
        seam.drain()
        seam.finish(list(seam.requests._known))
    finally:
        seam.logger.close()
        seam.logger = None
    traces = open_traces(tmp_path / "t", verify=True)
    found = counts(seam)
    assert (found["log_requests"], found["log_dropped"], found["log_faults"]) == (9, 0, 0)
    names = traces.manifest.prompt_ids
    first = min(int(name.split("-")[0]) for name in names)
    check_rows(traces, pair, asked[:1] + asked, begun + said, range(9), first)
    assert set(np.unique(traces.column("origin"))) == {1, 2, 3}


def test_limits_hold_on_the_device_and_are_what_is_counted(llm):
    bold = use(llm, rule="opt:alpha=0.0")
    say(llm, ASKED, {"deferral_dial": 5.0})
    free = counts(bold)["estimated_loss"] / len(ASKED)
    seam, spent, accounts = use(llm, rule="opt:alpha=0.0"), {}, {}
    seam.requests.forget = remembering(seam.requests, spent)
    close = seam.close_requests

    def noting(names):
        accounts.update({name: float(seam._accounts[seam._account_of[name]]) for name in names})
        close(names)

    seam.close_requests = noting
    try:
        say(llm, ASKED, {"deferral_dial": 5.0, "deferral_max_request_loss": free / 3})
        generate(llm, ASKED[:1], {"deferral_dial": 5.0}, max_tokens=1)  # ends are told with the next step
    finally:
        del seam.close_requests
    found = counts(seam)
    assert len(spent) == len(ASKED)
    assert all(0 < one <= free / 3 for one in spent.values())
    assert sum(spent.values()) == pytest.approx(found["estimated_loss"])
    assert accounts == pytest.approx(spent)


def test_what_cannot_be_right_is_refused_by_name(llm):
    config = ServingConfig(rule="opt:alpha=0.2")
    right = llm.llm_engine.vllm_config
    assert right.use_v2_model_runner
    assert check_engine(right, config).name == "opt"
    for part, name, value, line in (
        ("parallel_config", "enable_batch_sharded_sampling", True, "parallel_config.enable_batch_sharded_sampling"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism is not supported"),
        ("speculative_config", "enable_adaptive_verification", True, "speculative_config.enable_adaptive_verif"),
        ("speculative_config", "rejection_sample_method", "block", "rejection_sample_method is 'block'"),
        ("speculative_config", "rejection_sample_method", "fly", "rejection_sample_method is 'fly'"),
        ("speculative_config", "method", "xpress", "method 'xpress' cannot be used with a rule: the runner"),
        ("speculative_config", "method", "suffix", "its proposals are looked up, and have no"),
        ("model_config", "enable_trace_replay", True, "model_config.enable_trace_replay"),
        (None, "watermark_config", object(), "watermark_config cannot be used with a rule"),
    ):  # fmt: skip
        wrong = copy.copy(right)
        changed = wrong if part is None else copy.copy(getattr(right, part))
        object.__setattr__(changed, name, value)
        if part is not None:
            object.__setattr__(wrong, part, changed)
        with pytest.raises(InputError, match=line) as found:
            check_engine(wrong, config)
        assert "\n" not in str(found.value)


def test_another_sampler_or_signature_is_refused_and_a_replaced_one_is_an_error(llm, monkeypatch):
    from deferral_train.serving import sampler_v2
    from deferral_train.serving.seam import check_parts

    class Other:
        pass

    with pytest.raises(InputError, match=r"rejection sampler of its own \(Other\)"):
        sampler_v2.check_sampler(SimpleNamespace(rejection_sampler=Other()))
    with pytest.raises(InputError, match="this engine's SimpleNamespace has no load_model, "):
        check_parts(SimpleNamespace(), ("load_model", "sample"))
    plain = sampler_v2.RejectionSampler.__new__(sampler_v2.RejectionSampler)
    sampler_v2.check_sampler(SimpleNamespace(rejection_sampler=plain))
    monkeypatch.setattr(sampler_v2, "ARGUMENTS", ("logits", "draft_odds"))
    with pytest.raises(InputError, match="_verify of this vLLM has no draft_odds"):
        sampler_v2.check_sampler(SimpleNamespace(rejection_sampler=plain))
    seam, runner = use(llm, rule="opt:alpha=0.2"), runner_of(llm)
    runner.rejection_sampler = object()
    try:
        with pytest.raises(RuntimeError, match="rejection sampler was replaced"):
            seam.schedule(None)
    finally:
        runner.rejection_sampler = seam.sampler


@pytest.mark.slow
def test_preemption_and_chunked_prefill_change_no_greedy_token_and_no_account(pair):
    tokens = 20
    long = prompts(8, seed=8, shortest=50, longest=60)
    expected = greedy_text(pair, long, tokens)
    tight = {"max_num_batched_tokens": 80, "num_gpu_blocks_override": 8, "block_size": 32}
    narrow = start(pair, {"rule": "opt:alpha=0.0", "max_request_loss": 0.5}, **tight)
    try:
        seam = use(narrow, rule="opt:alpha=0.0", max_request_loss=0.5)
        seam.rules = seam.reads = lambda request: True
        assert generate(narrow, long, {"deferral_lossless": 1}, max_tokens=tokens) == expected
        del seam.rules, seam.reads
        before = preemptions(narrow)
        assert before > 0
        seam, spent = use(narrow, rule="opt:alpha=0.0", max_request_loss=0.5), {}
        seam.requests.forget = remembering(seam.requests, spent)
        generate(narrow, long, {"deferral_dial": 5.0}, max_tokens=tokens)
        assert preemptions(narrow) > before
        found = counts(seam)
        generate(narrow, long[:1], {"deferral_lossless": 1}, max_tokens=1)
    finally:
        stop(narrow)
    # One account per request, however often it was preempted: nobody begins again at zero.
    assert found["requests"] == len(spent) == len(long)
    assert all(0 < amount <= 0.5 for amount in spent.values())
    assert sum(spent.values()) == pytest.approx(found["estimated_loss"])

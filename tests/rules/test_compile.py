"""torch.compile: verify_block traced with graph breaks, and the dense variant as one graph."""

from __future__ import annotations

import pytest
import torch
from instances import instances, label
from test_verify import block

from deferral_train.errors import InputError
from deferral_train.rules import make_rule, verify_block
from deferral_train.rules.block import Block
from deferral_train.rules.dense import LOGARITHMS, REDUCED, knows, reductions, score_dense
from deferral_train.rules.sampling import uniforms
from deferral_train.rules.scoring import score_block
from deferral_train.rules.summary import summarize


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("lossless", 1.0)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("opt", 0.0), ("opt", 1.0), ("token_v3", 1.0), ("lossy", 1.0))
    ],
)
def test_a_compiled_verify_block_gives_the_same_verdict(name, temperature):
    drafted, drafter, verifier = block(seed=2, rows=5)
    if temperature == 0:
        drafted = drafter[:, :-1].argmax(-1)
    rule = make_rule(name)

    def run(call):
        generator = torch.Generator().manual_seed(3)
        return call(rule, drafted, drafter, verifier, temperature=temperature, generator=generator)

    plain, compiled = run(verify_block), run(torch.compile(verify_block, backend="eager"))
    assert torch.equal(plain.accepted, compiled.accepted)
    assert torch.equal(plain.next_token, compiled.next_token)
    assert torch.equal(plain.origin, compiled.origin)


@pytest.mark.parametrize("name", ["token_v3"])
def test_a_compiled_target_is_the_target(name):
    rule, (_, drafter, verifier) = make_rule(name), block(seed=2, rows=5)
    compiled = torch.compile(rule.target, backend="aot_eager")
    torch.testing.assert_close(
        compiled(drafter, verifier), rule.target(drafter, verifier), atol=1e-14, rtol=0
    )


def test_reductions_are_one_graph_and_equal_the_summary():
    drafted, drafter, verifier = block(seed=4)
    verifier = verifier.masked_fill(torch.arange(verifier.shape[-1]) == 2, -torch.inf)
    drafts = drafted.shape[1]
    drafter, verifier = drafter[:, :drafts], verifier[:, :drafts]
    one_graph = torch.compile(reductions, backend="aot_eager", fullgraph=True)
    found = one_graph(drafter, verifier, drafted, REDUCED)
    names = [*REDUCED, "drafter_logsumexp", "verifier_logsumexp", "drafter_logprob", "verifier_logprob"]
    expected = summarize(drafter, verifier, token=drafted, fields=names)
    for name in names:
        value = found[name].exp() if name in LOGARITHMS else found[name]
        torch.testing.assert_close(value, expected[name], atol=1e-13, rtol=1e-12)


def test_v3_at_alpha_0_keeps_the_verifier_s_argmax_to_the_last_bit():
    generator = torch.Generator().manual_seed(9)
    verifier = 4 * torch.randn(64, 4, 30, generator=generator)
    drafter = 4 * torch.randn(64, 4, 30, generator=generator)
    drafted = verifier[:, :3].argmax(dim=-1)
    given = Block.of(drafted, drafter, verifier, 1.0, None, None, None, None)
    uniform, _ = uniforms(*drafted.shape, generator, verifier)
    compiled = torch.compile(reductions, backend="aot_eager", fullgraph=True)
    for reduce in (reductions, compiled):
        scores = score_dense(make_rule("token_v3", alpha=0.0), given, False, uniform, reduce=reduce)
        assert bool(scores.kept.all())
    assert bool(score_block(make_rule("token_v3", alpha=0.0), given, False, uniform).kept.all())


DENSE = [r for r in instances() if knows(r, limited=False)]


@pytest.mark.parametrize("rule", DENSE, ids=label)
def test_dense_scores_equal_the_straightforward_ones(rule):
    drafted, drafter, verifier = block(seed=6)
    verifier = verifier.masked_fill(torch.arange(verifier.shape[-1]) == 2, -torch.inf)
    lengths = torch.arange(len(drafted)) % (drafted.shape[1] + 1)
    given = Block.of(drafted, drafter, verifier, 1.0, None, None, lengths, None)
    uniform, _ = uniforms(*drafted.shape, torch.Generator().manual_seed(1), verifier)
    limited = knows(rule, limited=True)
    dense = score_dense(rule, given, limited, uniform, reduce=reductions)
    plain = score_block(rule, given, limited, uniform)
    assert torch.equal(dense.deferred, plain.deferred)
    assert torch.equal(dense.kept, plain.kept)
    torch.testing.assert_close(dense.ratio, plain.ratio, atol=1e-13, rtol=0)
    torch.testing.assert_close(dense.exact_ratio, plain.exact_ratio, atol=1e-13, rtol=0)
    if limited:
        inside = given.inside
        torch.testing.assert_close(dense.gap[inside], plain.gap[inside], atol=1e-13, rtol=0)


def test_the_dense_variant_knows_the_paper_s_rules():
    names = {rule.name for rule in DENSE}
    assert {"lossless", "chow", "chow_log", "diff", "diff_log", "opt", "opt_log", "opt_verifier"} <= names
    assert {"token_v1", "token_v2", "token_v3", "typical", "logit_margin"} <= names


def test_the_dense_variant_refuses_bad_logits():
    drafted, drafter, verifier = block(seed=6)
    verifier[3, 1, 2] = torch.nan
    given = Block.of(drafted, drafter, verifier, 1.0, None, None, None, None)
    uniform, _ = uniforms(*drafted.shape, None, verifier)
    with pytest.raises(InputError, match="verifier_logits has NaN"):
        score_dense(make_rule("opt"), given, False, uniform, reduce=reductions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_verdicts_equal_the_cpu_s():
    drafted, drafter, verifier = block(seed=6, rows=16, vocabulary=5000, dtype=torch.float32)
    numbers = torch.Generator().manual_seed(5)
    for name in ("lossless", "opt", "token_v3"):
        cpu = verify_block(make_rule(name), drafted, drafter, verifier, generator=numbers.manual_seed(5))
        tensors = (tensor.cuda() for tensor in (drafted, drafter, verifier))
        gpu = verify_block(make_rule(name), *tensors, generator=numbers.manual_seed(5))
        assert torch.equal(cpu.accepted, gpu.accepted.cpu())
        assert torch.equal(cpu.next_token, gpu.next_token.cpu())

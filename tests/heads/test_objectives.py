import pytest
import torch
from heads.distributions import FEATURES, every_head, logits, shaken, summary_of
from torch.nn import functional as F

from deferral_train.errors import InputError
from deferral_train.heads import CostSensitiveHead, GapHead, TokenHead, TruthMixtureHead
from deferral_train.heads.objectives import OBJECTIVES, draw_alpha, objective_for


def generator():
    return torch.Generator().manual_seed(0)


def batch_of(head, rows=60):
    summary = summary_of(rows)
    torch.manual_seed(1)
    return {"x": head.columns(summary), "z": torch.randint(-1, 2, (rows,)).float(), "tv": summary["tv"]}


def test_squared_is_the_mean_square():
    head = every_head()["gap"]
    batch = batch_of(head)
    wanted = ((head(batch["x"])["gap"] - batch["z"]) ** 2).mean()
    torch.testing.assert_close(OBJECTIVES["squared"](head, batch, generator()), wanted)


def test_cost_sensitive_by_hand():
    head = every_head()["cost_sensitive"]
    batch = batch_of(head)
    alpha = draw_alpha(batch["z"], generator())
    score, margin = head.score(batch["x"], alpha), batch["z"] - alpha * batch["tv"]
    wanted = 0.0
    for s, m in zip(score, margin):
        wanted += abs(m) * F.softplus(-s if m > 0 else s)
    found = OBJECTIVES["cost_sensitive"](head, batch, generator())
    torch.testing.assert_close(found, wanted / len(score))


def test_cost_sensitive_is_consistent_for_the_sign():
    """With one feature vector, the minimiser's sign is that of E z - alpha tv for every alpha."""
    z = torch.tensor([1.0] * 6 + [-1.0] * 3 + [0.0] * 3)  # E z = 0.25
    tv = torch.full_like(z, 0.5)
    for alpha in (0.1, 0.4, 0.6, 0.9):
        margin = z - alpha * tv
        grid = torch.linspace(-6, 6, 2401)
        loss = (margin.abs() * F.softplus(-grid[:, None] * margin.sign())).mean(1)
        assert (grid[loss.argmin()] > 0) == (alpha * 0.5 < 0.25)


def test_likelihood_of_classes_and_candidates_is_a_log_distribution():
    """With all V tokens logged, exp(-loss) over every possible gold token sums to one in each row."""
    rows, vocab = 12, 9
    head = every_head()["truth_mixture"]
    with torch.no_grad():
        head.body[0].weight.mul_(0.1)  # a + b stays positive, so that the absent tail has no weight
    summary = summary_of(rows)
    q, p = (t.log_softmax(-1) for t in logits(rows))
    top = F.one_hot(summary["drafter_argmax"], vocab) + F.one_hot(summary["verifier_argmax"], vocab)
    total = torch.zeros(rows)
    for gold in range(vocab):
        golds = torch.full((rows,), gold)
        target = torch.full((rows,), 2)
        target[golds == summary["drafter_argmax"]] = 1
        target[golds == summary["verifier_argmax"]] = 0
        for row in range(rows):
            pick = slice(row, row + 1)
            batch = {
                "x": head.columns(summary)[pick],
                "target": target[pick],
                "cand_drafter": q[pick],
                "cand_verifier": p[pick],
                "cand_gold": F.one_hot(golds, vocab).bool()[pick],
                "cand_valid": torch.ones(1, vocab, dtype=torch.bool),
                "cand_top": top.bool()[pick],
                "tail_drafter": torch.full((1,), -1e4),
                "tail_verifier": torch.full((1,), -1e4),
            }
            total[row] += torch.exp(-OBJECTIVES["likelihood"](head, batch, generator())).item()
    torch.testing.assert_close(total, torch.ones(rows), rtol=1e-4, atol=1e-4)


def test_candidates_counts_valid_entries_once():
    head = every_head()["token"]
    summary = summary_of(10)
    q, p = (t.log_softmax(-1)[:, :4] for t in logits(10))
    valid = torch.tensor([True, True, False, True]).expand(10, 4)
    gold = torch.zeros(10, 4, dtype=torch.bool)
    gold[:, 1] = True
    batch = {
        "x": head.columns(summary),
        "cand_drafter": q,
        "cand_verifier": p,
        "cand_gold": gold,
        "cand_valid": valid,
    }
    truth = head.truth(q, p, summary)
    wanted = -(truth[:, 1].log() + (1 - truth[:, 0]).log() + (1 - truth[:, 3]).log()).mean()
    found = OBJECTIVES["candidates"](head, batch, generator())
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-3, atol=1e-4)


def test_auto_and_mismatched_objectives():
    assert objective_for(GapHead(FEATURES)) == "squared"
    assert objective_for(CostSensitiveHead(FEATURES)) == "cost_sensitive"
    assert objective_for(TruthMixtureHead(FEATURES)) == "likelihood"
    assert objective_for(TokenHead(FEATURES)) == "candidates"
    assert objective_for(GapHead(FEATURES), "cost_sensitive") == "cost_sensitive"
    for head, name in (
        (GapHead, "likelihood"),
        (CostSensitiveHead, "squared"),
        (TokenHead, "cost_sensitive"),
    ):
        with pytest.raises(InputError, match=name):
            objective_for(head(FEATURES), name)
    with pytest.raises(InputError, match="hinge"):
        objective_for(GapHead(FEATURES), "hinge")


@pytest.mark.parametrize("name", ["gap", "gap_draft", "cost_sensitive"])
def test_every_parameter_gets_a_gradient(name):
    head = shaken(every_head()[name]).train()
    batch = batch_of(head) | {"reject": torch.rand(60)}
    OBJECTIVES[objective_for(head)](head, batch, generator()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())

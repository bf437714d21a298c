"""Learned token rules against the paper's, sampled text: the T5 pair on Multi30k En-De, temperature 1.

    python -m benchmarks.studies.multi30k_tokens [--shared ../shared] [--work runs/multi30k] [--out FILE] [--part test]

Truth mixtures are fitted on traces of train lines 23,001-28,000 that log 256 candidates of each model, chosen on
``val`` by area, reported on ``test_2016_flickr``. Nothing is estimated from logged candidates: both models run over
the references and every distribution is taken over the whole vocabulary, so that the risk E[1 - pi(gold)] and the
rejection rate D_TV(q, pi) of every rule are exact at each position. Areas between risk-rejection curves, paired
bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import keep, study_flags
from benchmarks.studies.multi30k_heads import COMMON, FEATURES, SHARES, collect_parts, part_prompts
from deferral_train.collecting.scoring import make_inputs, score
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.evaluation.curves import Curve, area_difference, differences
from deferral_train.heads.rules import LearnedTokenRule, dropped_set
from deferral_train.pairs.encode import EncodedPrompt, encode_prompts
from deferral_train.pairs.load import ModelPair, load_models
from deferral_train.rules import make_rule
from deferral_train.rules.base import Rule
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.emission import keep_distribution, rejection_mass
from deferral_train.rules.summary import Summary
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit

BATCH = 4  # prompts; about 70 positions over 4,000 tokens stay in a core's cache
RULES = ("token_v1", "token_v2", "token_v3", "lossy", "opt", "opt_verifier")
DIALS = 25
# alpha is the price of a rejection in expected correct tokens; negative ones reach the lossless end
ALPHAS = (*(-np.geomspace(3, 0.02, 6)), *np.linspace(0, 0.8, 17))
CANDIDATES: dict[str, dict[str, Any]] = {
    "truth_mixture_linear": {"head": "truth_mixture", "body": "linear", "features": FEATURES, "lr": 0.02},
    "truth_mixture_mlp": {
        "head": "truth_mixture", "hidden": (16,), "features": FEATURES, "weight_decay": 0.05, "lr": 0.01
    },
}  # fmt: skip


def heads(shared: Path, work: Path, epochs: int) -> dict[str, Rule]:
    """Fitted candidates as token rules; run again it reads the finished checkpoints."""
    traces = collect_parts(shared, work / "traces-256", ("fit", "stop"), top_k=256)
    common = {**COMMON, "epochs": epochs}
    found: dict[str, Rule] = {}
    for name, settings in CANDIDATES.items():
        config = FitConfig(train=traces["fit"], val=traces["stop"], **{**common, **settings})
        head = fit(config, work / "token_heads" / name).head
        found[name] = LearnedTokenRule(head=head, priced=True)  # type: ignore[arg-type]
        print(f"  fitted {name}: {head.num_parameters} parameters", flush=True)
    return found


def settings_of(rule: Rule) -> list[Rule]:
    """A rule over its dial."""
    if isinstance(rule, LearnedTokenRule):
        return [replace(rule, alpha=float(alpha)) for alpha in ALPHAS]
    assert rule.dial is not None
    return [rule.with_dial(value) for value in rule.dial.grid(DIALS)]


def batches(
    pair: ModelPair, prompts: Sequence[EncodedPrompt]
) -> Iterator[tuple[int, Distributions, Tensor, Tensor, Tensor]]:
    """(first prompt, distributions [N, V], gold [N], position [N], prompt of row [N]) over the references."""
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        references = [prompt.reference_ids for prompt in part]
        logits = []
        with torch.inference_mode():
            for model in (pair.drafter, pair.verifier):
                inputs = make_inputs(model, [prompt.input_ids for prompt in part], references, model.device)
                logits.append(score(model, inputs).logits[inputs.rows, : pair.vocab_size])
        gold = torch.tensor([token for reference in references for token in reference])
        position = torch.cat([torch.arange(len(reference)) for reference in references])
        row = torch.arange(len(part)).repeat_interleave(torch.tensor([len(r) for r in references]))
        yield first, Distributions.of(logits[0], logits[1]), gold, position, row


def measure(
    pair: ModelPair, prompts: Sequence[EncodedPrompt], rules: Mapping[str, Rule]
) -> dict[str, np.ndarray]:
    """Per rule, sums [2, S + 2, P] of rejections and risk by prompt; drafter first, lossless last."""
    swept = {name: settings_of(rule) for name, rule in rules.items()}
    sums = {name: np.zeros((2, len(settings) + 2, len(prompts))) for name, settings in swept.items()}
    for first, distributions, gold, position, row in batches(pair, prompts):
        context = Summary({"position": position})
        count = int(row.max()) + 1
        ends = [_effect(distributions.q, distributions, gold), _effect(distributions.p, distributions, gold)]
        for name, settings in swept.items():
            reader = next(rule for rule in settings if not rule.is_lossless)  # a lossless one reads nothing
            summary = reader.read(distributions, context=context)
            with torch.inference_mode():
                inner = [
                    _effect(pi, distributions, gold) for pi in _targets(settings, distributions, summary)
                ]
            effects = torch.stack([ends[0], *inner, ends[1]], dim=1)  # [2, S + 2, N]
            by_prompt = effects.new_zeros(2, effects.shape[1], count).index_add_(2, row, effects)
            sums[name][:, :, first : first + count] = by_prompt.numpy()
        if first % (BATCH * 25) == 0:
            print(f"  {first} of {len(prompts)} prompts", flush=True)
    return sums


def _targets(settings: Sequence[Rule], distributions: Distributions, summary: Summary) -> Iterator[Tensor]:
    """pi of each setting of a rule, [N, V]; a head's P^ is computed once for all of its alphas."""
    first = settings[0]
    if not isinstance(first, LearnedTokenRule):
        yield from (rule.distribution_from(distributions, summary) for rule in settings)
        return
    truth = first.head.truth(distributions.drafter_logprobs, distributions.verifier_logprobs, summary)
    for alpha in ALPHAS:
        yield keep_distribution(
            distributions.q,
            distributions.p,
            ~dropped_set(distributions.q, distributions.p, truth, float(alpha)),
        )


def _effect(pi: Tensor, distributions: Distributions, gold: Tensor) -> Tensor:
    """Rejection probability and risk at each position, [2, N] float64."""
    risk = 1 - pi.gather(-1, gold.unsqueeze(-1)).squeeze(-1)
    return torch.stack([rejection_mass(pi, distributions.q), risk]).double()


def curves(sums: Mapping[str, np.ndarray], rows: np.ndarray, boot: PromptBootstrap) -> dict[str, Curve]:
    """Risk against rejection rate per rule, with redraws."""
    total = boot.sums(rows)
    found = {}
    for name, (rejected, risk) in sums.items():
        x, y = (values.sum(-1) / rows.sum() for values in (rejected, risk))
        x_redrawn, y_redrawn = (
            np.stack([boot.sums(each) / total for each in values]) for values in (rejected, risk)
        )
        found[name] = Curve(name, x, y, x_redrawn, y_redrawn)
    return found


def compare(curve: Curve, others: Mapping[str, Curve], boot: PromptBootstrap) -> dict[str, Any]:
    rows = {}
    for name, other in others.items():
        gaps = differences(curve, other, boot, SHARES)
        worse = [float(share) for share, gap in zip(SHARES, gaps) if gap.low is not None and gap.low > 0]
        rows[name] = {
            "area": other.area()[0],
            "head_minus_rule": area_difference(curve, other, boot).as_dict(),
            "significant_excess": worse,
        }
    return {"chosen": curve.name, "area": curve.area()[0], "against": rows}


def show(result: Mapping[str, Any]) -> str:
    lines = [f"{result['chosen']}: area {result['area']:.5f}"]
    for name, row in result["against"].items():
        gap = row["head_minus_rule"]
        lines.append(
            f"  {name:<14} area {row['area']:.5f}  head minus rule {gap['value']:+.5f} "
            f"[{gap['low']:+.5f}, {gap['high']:+.5f}]; significant excess at "
            f"{len(row['significant_excess'])} of {len(SHARES)} rates"
        )
    return "\n".join(lines)


def main() -> int:
    parser = study_flags(__doc__, "runs/multi30k")
    parser.add_argument("--redraws", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--limit", type=int, help="prompts of val and test, for a short look")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    options = parser.parse_args()
    folder = options.shared / "models" / "multi30k-en-de"
    if not folder.is_dir():
        print(f"multi30k_tokens: no pair and text under {options.shared}; nothing was run")
        return 0
    pair = load_models(folder / "drafter", folder / "verifier", device="cpu", dtype="float32")
    parts = {}
    for part in ("choose", "test"):
        prompts = part_prompts(options.shared, part)[: options.limit]
        parts[part] = encode_prompts(
            pair.tokenizer, prompts, is_encoder_decoder=True, require_reference=True
        ).kept
    candidates = heads(options.shared, options.work, options.epochs)
    tried = measure(pair, parts["choose"], candidates)
    lengths = {part: np.array([len(p.reference_ids) for p in kept], float) for part, kept in parts.items()}
    areas = {
        name: curve.area()[0]
        for name, curve in curves(
            tried, lengths["choose"], PromptBootstrap(len(parts["choose"]), 0, 0)
        ).items()
    }
    best = min(areas, key=areas.__getitem__)
    print(f"areas on val: {areas}; chosen {best}", flush=True)
    rules = {best: candidates[best], **{name: make_rule(name) for name in options.rules}}
    boot = PromptBootstrap(len(parts["test"]), options.redraws, 0)
    found = curves(measure(pair, parts["test"], rules), lengths["test"], boot)
    result = compare(found.pop(best), found, boot)
    print(show(result))
    keep(options, {"choose_areas": areas, "result": result}, {"fit": 0, "bootstrap": 0})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Judges on real text: SelfJudge- and AutoJudge-style heads on the shared T5 pair, Multi30k En-De, greedy.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.self_judge [--shared ../shared] [--work runs/self_judge] [--out FILE]

The pair was trained on lines 1-23,000 of ``train``. Labels are made on the verifier's own greedy text of lines from
23,001 on (heads are fitted there: 3,000 for SelfJudge, 600 for AutoJudge, whose labels cost more), from 28,001 on
(early stopping) and of ``val`` (thresholds); reported on the first 400 (``--test``) of ``test_2016_flickr``. One row
per rule and setting: mean acceptance length (tokens per verifier call), chrF, BLEU, with 95% bootstrap intervals over
prompts, chrF also as a paired difference from lossless. R and F are SelfJudge's choices of the threshold; the sweep
takes those that approve of a given share of the judged tokens of ``val``. ``opt`` and ``token_v3`` at the setting
whose acceptance length on ``val`` (100 prompts) is nearest to each judge's.

Everything reported is counted, so that other load on the machine changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import keep, study_flags
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding import Pair, load_pair
from deferral_train.evaluation.judging import choose_threshold, sweep
from deferral_train.evaluation.quality import corpus_bleu, per_prompt
from deferral_train.heads.judge import JudgeHead
from deferral_train.pairs.prompts import Prompt, read_prompts
from deferral_train.rules import Rule, make_rule
from deferral_train.traces import Traces, open_traces
from deferral_train.traces.judged import acceptable, judged_rows, resolve_truth
from deferral_train.traces.sequence import argmax_summary
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit

PARTS = {  # file, first line (0-based)
    "fit": ("train", 23_000),
    "stop": ("train", 28_000),
    "calibration": ("val", 0),
    "test": ("test_2016_flickr", 0),
}
COUNTS = {  # prompts of each part
    "selfjudge": {"fit": 3_000, "stop": 500, "calibration": 300},
    "autojudge": {"fit": 600, "stop": 150, "calibration": 300},
    "decoded": {"calibration": 100, "test": 400},
}
STATE = ("verifier_hidden_at_token",)
DISTRIBUTIONS = (
    "verifier_hidden_at_token", "drafter_logprob", "verifier_logprob", "drafter_max:logit", "verifier_max:logit",
    "drafter_entropy", "verifier_entropy", "kl:log1p", "position:log1p",
)  # fmt: skip
# Name -> labels, share of judged tokens that are acceptable (None: AutoJudge decides), features, body
HEADS: dict[str, tuple[str, float | None, Sequence[str], str]] = {
    "selfjudge": ("selfjudge", 0.3, STATE, "linear"),
    "selfjudge_tenth": ("selfjudge", 0.1, STATE, "linear"),
    "selfjudge_distributions": ("selfjudge", 0.3, DISTRIBUTIONS, "linear"),
    "autojudge": ("autojudge", None, STATE, "linear"),
    "autojudge_distributions": ("autojudge", None, DISTRIBUTIONS, "linear"),
}
SWEPT = ("selfjudge", "autojudge")
SHARES = (0.05, 0.1, 0.2)  # of judged tokens that a threshold of the sweep approves of
PLUG_INS = {"opt": (-0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.4), "token_v3": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)}
DRAFT, NEW, REDRAWS = 5, 48, 2000


def main() -> int:
    parser = study_flags(__doc__, "runs/self_judge")
    parser.add_argument("--limit", type=int, help="prompts of every part, in place of its own number")
    parser.add_argument(
        "--test", type=int, default=COUNTS["decoded"]["test"], help="prompts reported on, up to 1,000"
    )
    parser.add_argument("--heads", nargs="+", choices=sorted(HEADS), default=list(HEADS))
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="chrF (0 to 1) that AutoJudge lets a swap cost"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.shared / "models" / "multi30k-en-de"
    pair = load_pair(str(folder / "drafter"), str(folder / "verifier"), options.device)
    counts = {use: {part: options.limit or n for part, n in own.items()} for use, own in COUNTS.items()}
    counts["decoded"]["test"] = options.limit or options.test
    prompts = {part: _prompts(options.shared, part, n) for part, n in counts["decoded"].items()}
    labels = {HEADS[name][0] for name in options.heads}
    traces = {
        kind: {
            part: _collected(pair, _prompts(options.shared, part, n), kind, options.work, options.tolerance)
            for part, n in counts[kind].items()
        }
        for kind in sorted(labels, reverse=True)
    }
    print("labels are there", flush=True)
    decoded = {"lossless": _decode(pair, prompts["test"], make_rule("lossless"))}
    on_val: dict[str, Any] = {}
    heads: dict[str, Any] = {}
    for name in options.heads:
        labelled = traces[HEADS[name][0]]
        head, record = _fitted(name, labelled, options.work)
        points = {
            variant: choose_threshold(head, labelled["calibration"], record["truth"], by)
            for variant, by in (("R", "recall"), ("F", "f1"))
        }
        heads[name] = record | {f"chosen_{key}": asdict(point) for key, point in points.items()}
        print(name, heads[name], flush=True)
        settings = {f"{name}-{variant}": point.threshold for variant, point in points.items()}
        for share in SHARES if name in SWEPT else ():
            settings[f"{name}:share={share:g}"] = _approving(head, labelled["calibration"], share)
        for label, threshold in settings.items():
            rule = make_rule("judge", head=head, threshold=threshold)
            on_val[label] = _decode(pair, prompts["calibration"], rule)
            decoded[label] = _decode(pair, prompts["test"], rule)
            print(text_of({label: _row(decoded[label], decoded["lossless"])}), flush=True)
    decoded |= _matched(pair, prompts, on_val)
    table = {name: _row(rows, decoded["lossless"]) for name, rows in decoded.items()}
    print(text_of(table))
    conditions = {
        "draft_tokens": DRAFT,
        "max_new_tokens": NEW,
        "temperature": 0,
        "tolerance": options.tolerance,
        "dtype": "float32",
        "redraws": REDRAWS,
    }
    result = {"heads": heads, "table": table, "prompts": counts}
    keep(options, {"benchmark": "self_judge", "conditions": conditions, **result}, {"seed": 0})
    return 0


def _prompts(shared: Path, part: str, count: int) -> list[Prompt]:
    name, start = PARTS[part]
    data = shared / "data" / "multi30k"
    return read_prompts(
        str(data / f"{name}.en.gz"), reference_path=str(data / f"{name}.de.gz"), start=start, limit=count
    )


def _collected(pair: Pair, prompts: Sequence[Prompt], kind: str, work: Path, tolerance: float) -> Traces:
    """Labelled traces of the prompts; made once per folder."""
    config = CollectConfig(
        prefixes="verifier", temperature=0.0, labels=kind, label_tolerance=tolerance, max_new_tokens=NEW,
        log_top_k=0, chunk_prompts=150, batch_tokens=4096, device=str(pair.models.device),
    )  # fmt: skip
    out = work / f"{kind}-{prompts[0].id.replace('#', '-').replace('/', '-')}-{len(prompts)}"
    collect(
        config, out, progress=False, models=pair.models, prompts=prompts,
        scores={"chrf": lambda texts, references: per_prompt("chrf", texts, references).tolist()},
    )  # fmt: skip
    return open_traces(out)


def _fitted(name: str, traces: Mapping[str, Traces], work: Path) -> tuple[JudgeHead, dict[str, Any]]:
    kind, rate, features, body = HEADS[name]
    truth = "judge" if rate is None else f"judge:rate={rate:g}"
    truth = resolve_truth(truth, traces["fit"])
    config = FitConfig(
        train=traces["fit"], val=traces["stop"], head="judge", features=features, body=body, truth=truth,
        batch_size=2048, epochs=20, patience=6, lr=0.01, weight_decay=0.01, figure_every=0,
    )  # fmt: skip
    head = fit(config, work / name, resume=False).head
    assert isinstance(head, JudgeHead)
    rows = judged_rows(traces["fit"])
    share = float(acceptable(traces["fit"], truth)[rows].double().mean())
    points = sweep(head, traces["calibration"], truth)
    record = {
        "labels": kind, "truth": truth, "rows": int(rows.sum()), "acceptable": share, "features": list(features),
        "parameters": head.num_parameters, "calibration_auroc": _auroc(points),
    }  # fmt: skip
    return head, record


def _approving(head: JudgeHead, traces: Traces, share: float) -> float:
    """The threshold that approves of a share of the judged tokens."""
    scores = head.score(argmax_summary(traces, head.features).select(judged_rows(traces)))
    return float(scores.double().quantile(1 - share))


def _auroc(points: Sequence[Any]) -> float:
    """Area under recall against the share of important tokens approved."""
    wrong, right = [1 - p.specificity for p in points][::-1], [p.recall for p in points][::-1]
    return float(np.trapezoid(right, wrong))


def _decode(pair: Pair, prompts: Sequence[Prompt], rule: Rule) -> dict[str, Any]:
    """Per prompt: tokens emitted and verifier calls; texts and their sentence chrF."""
    done = pair.generate(
        prompts, rule, num_draft_tokens=DRAFT, max_new_tokens=NEW, batch_size=32, accept_mismatch=True
    )
    references = [str(prompt.reference) for prompt in prompts]
    return {
        "tokens": done.stats.emitted.numpy().astype(float),
        "calls": done.stats.verifier_calls.numpy().astype(float),
        "texts": done.texts,
        "references": references,
        "chrf": 100 * per_prompt("chrf", done.texts, references),
    }


def _matched(
    pair: Pair, prompts: Mapping[str, Sequence[Prompt]], on_val: Mapping[str, Any]
) -> dict[str, Any]:
    """The plug-in rules at the setting of nearest acceptance length on the calibration prompts, per judge."""
    found: dict[str, Any] = {}
    for name, grid in PLUG_INS.items():
        settings = {
            float(a): _decode(pair, prompts["calibration"], make_rule(name, alpha=float(a))) for a in grid
        }
        for judged, rows in on_val.items():
            wanted = rows["tokens"].sum() / rows["calls"].sum()
            alpha = min(
                settings,
                key=lambda a: abs(settings[a]["tokens"].sum() / settings[a]["calls"].sum() - wanted),
            )
            label = f"{name}:alpha={alpha:g}"
            if label not in found:
                found[label] = _decode(pair, prompts["test"], make_rule(name, alpha=alpha)) | {"for": []}
            found[label]["for"].append(judged)
    return found


def _row(rows: Mapping[str, Any], lossless: Mapping[str, Any]) -> dict[str, Any]:
    """Means with 95% percentile intervals over prompts, and paired differences from lossless."""
    count = len(rows["tokens"])
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=REDRAWS)

    def ratio(data: Mapping[str, Any]) -> np.ndarray:
        return (weights @ data["tokens"]) / (weights @ data["calls"])

    def mean(data: Mapping[str, Any]) -> np.ndarray:
        return weights @ data["chrf"] / count

    def interval(values: np.ndarray) -> list[float]:
        return [round(float(v), 4) for v in np.quantile(values, [0.025, 0.975])]

    length = rows["tokens"].sum() / rows["calls"].sum()
    return {
        "acceptance_length": round(float(length), 4),
        "acceptance_length_interval": interval(ratio(rows)),
        "longer_than_lossless": interval(ratio(rows) / ratio(lossless)),
        "chrf": round(float(rows["chrf"].mean()), 3),
        "chrf_interval": interval(mean(rows)),
        "chrf_minus_lossless": round(float(rows["chrf"].mean() - lossless["chrf"].mean()), 3),
        "chrf_minus_lossless_interval": interval(mean(rows) - mean(lossless)),
        "bleu": round(corpus_bleu(rows["texts"], rows["references"]), 2),
        "tokens_per_text": round(float(rows["tokens"].mean()), 3),
        **({"matched_to": rows["for"]} if "for" in rows else {}),
    }


def text_of(table: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'rule':<34} {'length':>7} {'interval':>18} {'chrF':>7} {'minus lossless':>26} {'BLEU':>6}"]
    for name, row in table.items():
        low, high = row["acceptance_length_interval"]
        down, up = row["chrf_minus_lossless_interval"]
        lines.append(
            f"{name:<34} {row['acceptance_length']:7.3f} [{low:7.3f}, {high:7.3f}] {row['chrf']:7.2f} "
            f"{row['chrf_minus_lossless']:7.2f} [{down:7.2f}, {up:7.2f}] {row['bleu']:6.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

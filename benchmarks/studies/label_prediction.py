"""Sequence labels: what they predict that a cascade's texts lose, against what those texts did lose.

    python -m benchmarks.studies.label_prediction --pair en-fr --head runs/rounds-fr/head --share 0.7 [--out FILE]

Lines of ``val`` from ``--start`` on, which neither fitted nor chose anything. Along the text of the head's cascade a
share of the places is labelled afresh; the sum of the gaps of kept places over the share is the prediction, the scores
of the cascade's texts and of the verifier's own are the count. With every place labelled the two are the same number (a
tested identity), so that the interval's width tells what the share costs. 95% intervals over 2,000 redraws of prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.common import keep, study_flags
from benchmarks.sequence_labels import prompts_of
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.pair import load_pair
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.evaluation.sequence import counted_loss, predicted_loss
from deferral_train.heads import DeferralHead
from deferral_train.traces import open_traces
from deferral_train.traces.sequence import labelled_rows

METRICS = ("sentence_bleu", "chrf1")


def main() -> int:
    parser = study_flags(__doc__, "runs/label-prediction")
    parser.add_argument("--pair", default="en-fr", choices=("en-fr", "en-de"))
    parser.add_argument("--head", type=Path, required=True, help="folder of a head with its chosen alpha")
    parser.add_argument("--start", type=int, default=500)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--share", type=float, default=0.7)
    options = parser.parse_args()
    models = options.shared / "models" / f"multi30k-{options.pair}"
    pair = load_pair(str(models / "drafter"), str(models / "verifier"), options.device)
    prompts = prompts_of(options.shared, options.pair, "val", options.limit)[options.start :]
    alpha = DeferralHead.from_pretrained(options.head).metadata["alpha"]
    scores = make_scorers(METRICS)
    how = {"temperature": 0.0, "log_top_k": 0, "max_new_tokens": 64}
    own = CollectConfig(
        prefixes="cascade", rule=f"learned:head={options.head},alpha={alpha}", labels="sequence",
        label_metric=METRICS, label_share=options.share, label_scales=(1.0, 1.0), num_draft_tokens=5, seed=11, **how,
    )  # fmt: skip
    collect(own, options.work / "own", models=pair.models, prompts=prompts, scores=scores)
    collect(
        CollectConfig(prefixes="verifier", **how),
        options.work / "verifier",
        models=pair.models,
        prompts=prompts,
    )
    traces, best = open_traces(options.work / "own"), open_traces(options.work / "verifier")
    predicted = 100 * predicted_loss(traces).loss
    references = {prompt.id: prompt.reference for prompt in prompts}
    counted = 100 * counted_loss(traces, best, pair.text, references, scores)
    redraws = PromptBootstrap(len(counted), 2000)
    found = {}
    for place, name in enumerate(METRICS):
        mine, theirs = predicted[:, place], counted[:, place]
        found[name] = {
            "predicted": redraws.mean(mine).as_dict(),
            "counted": redraws.mean(theirs).as_dict(),
            "difference": redraws.mean(mine - theirs).as_dict(),
        }
    labels = int(labelled_rows(traces).sum())
    result = {
        "study": "label_prediction", "pair": options.pair, "alpha": alpha, "start": options.start,
        "prompts": len(prompts), "share": options.share, "labels": labels, "points": found,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    keep(options, result, {"seed": 11})
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())

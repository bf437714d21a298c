"""Training-serving skew before and after learning from the cascade's own prefixes, on the T5 pair, Multi30k En-De.

    python -m benchmarks.studies.dagger [--prompts 2000] [--held-out 500] [--rounds 2] [--work runs/dagger] [--out FILE]

A draft-stage head (gap, D_TV and rejection from the drafter alone) is fitted on reference prefixes of train lines
from 23,001 on, labels under P := p (exact, no gold tokens needed), then refitted on the union with prefixes of its own
cascade, round by round. Temperature 0. Held-out: the first prompts of ``val``. Reported per head: what the latest
traces predict of its work against what decoding counts (95% bootstrap over prompts), and its error on held-out prefixes
of the kind it was trained on against those of its own cascade.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import keep, study_flags
from benchmarks.studies.multi30k_heads import part_prompts
from deferral_train.collecting.config import CollectConfig
from deferral_train.decoding.decode import DecodeConfig
from deferral_train.decoding.pair import Pair, Settings
from deferral_train.pairs.load import load_models
from deferral_train.pipeline.rounds import Rounds, learn
from deferral_train.training.config import FitConfig

TOKENS, BLOCK = 40, 5
FITTING = FitConfig(
    train="", stage="draft", truth="verifier", temperature=0.0, hidden=(32,), lr=0.01, weight_decay=0.01,
    batch_size=1024, epochs=15, figure_every=0,
)  # fmt: skip


def show(records: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for number, record in enumerate(records):
        lines.append(
            f"head {number}, fitted on {record['rows']:,} rows; its latest prefixes: {record['prefixes'][:40]}"
        )
        for row in record["skew"]:
            gap = row["difference"]
            lines.append(
                f"  {row['quantity']:<26} predicted {row['predicted']:.4f}  counted {row['counted']:.4f}  "
                f"difference {gap['value']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
            )
        lines += [
            f"  {name:<26} on prefixes it was trained for {record['trained'][name]:.5f}, "
            f"on its own {record['served'][name]:.5f}"
            for name in ("gap_brier", "tv_brier", "tv_ece", "excess_over_opt")
        ]
    return "\n".join(lines)


def main() -> int:
    parser = study_flags(__doc__, "runs/dagger")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=0.1)
    options = parser.parse_args()
    folder = options.shared / "models" / "multi30k-en-de"
    if not folder.is_dir():
        print(f"dagger: no pair and text under {options.shared}; nothing was run")
        return 0
    pair = Pair(load_models(folder / "drafter", folder / "verifier", device="cpu", dtype="float32"))
    settings = Settings(num_draft_tokens=BLOCK, max_new_tokens=TOKENS, temperature=0.0)
    rounds = Rounds(
        CollectConfig(temperature=0.0, log_top_k=0, max_new_tokens=TOKENS, num_draft_tokens=BLOCK),
        FITTING,
        DecodeConfig(settings=settings),
        options.alpha,
        options.work,
    )
    fit_prompts = part_prompts(options.shared, "fit")[: options.prompts]
    held_out = part_prompts(options.shared, "choose")[: options.held_out]
    records = learn(pair, fit_prompts, held_out, rounds, options.rounds)
    print(show(records))
    keep(options, {"records": records}, {"fit": 0})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

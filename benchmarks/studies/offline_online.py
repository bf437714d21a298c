r"""Offline meets online: what traces predict against what decoding counts, for every rule, on the same prompts.

    python -m benchmarks.studies.offline_online --drafter D --verifier V --prompts test.en.gz \
        --reference-path test.de.gz

For each temperature and rule the prompts are decoded and counted, the cascade's own prefixes are logged and its counts
predicted from them (on-policy), and once more from teacher-forced prefixes of the references. On-policy predictions
must agree within 3% or their 95% interval over prompts; what teacher forcing predicts is stated, not required.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import flags, keep
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.decode import DecodeConfig, decode
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.pair import Settings, load_pair
from deferral_train.evaluation import skew
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.prompts import Prompt, read_prompts, write_prompts
from deferral_train.traces import open_traces

# One setting of every rule without a head, between its ends.
RULES = (
    "lossless", "drafter_only", "lossy:alpha=0.3", "lenient:alpha=0.3", "bild:alpha=4", "chow:alpha=0.5",
    "chow_log:alpha=1.5", "diff:alpha=0.1", "diff_log:alpha=0.2", "opt:alpha=0.2", "opt_log:alpha=0.5",
    "opt_verifier:alpha=0.2", "token_v1:alpha=0.2", "token_v2:alpha=0.2", "token_v3:alpha=0.5",
    "ensemble:weight=0.5", "typical:epsilon=0.3", "mentored:divergence=0.3", "fuzzy:threshold=0.3",
    "cactus:delta=0.3", "logit_margin:margin=1", "biased:bias=0.3",
)  # fmt: skip
TEMPERATURES = (0.0, 0.5, 1.0)
COMMON = {"num_draft_tokens": 5, "max_new_tokens": 40, "seed": 0}


def compare(
    models: tuple[str, str], prompts: Sequence[Prompt], specs: Sequence[str], temperature: float, root: Path,
    *, repetitions: int = 2, bootstrap: int = 1000, top_k: int = 1024,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of :func:`deferral_train.evaluation.skew.compare` for every rule, from its own prefixes and from the
    references'; ``rule`` is the spec.

    Args:
        models: checkpoint folders of drafter and verifier. prompts: with references.
        repetitions: of decoding, when sampling; greedy decoding needs one.
        top_k: logged candidates, for rules that read whole distributions; with 64 the unlogged tail alone moves
            what Token V1 and Cactus are predicted to accept at temperature 1 by 4 and 8%.
    """
    write_prompts(root / "prompts.jsonl", prompts)
    named = {spec: rule_from_spec(spec, typed=[spec]) for spec in specs}
    settings = Settings(**COMMON, temperature=temperature, batch_size=50, accept_mismatch=True)
    times = repetitions if temperature else 1
    decode(
        load_pair(*models, "cpu", "float32"), prompts, named, DecodeConfig(settings, times), root / "decode"
    )
    outputs = list(read_lines(root / "decode" / OUTPUTS))
    logged = {
        "prompts": str(root / "prompts.jsonl"), "temperature": temperature, "log_top_k": top_k, "device": "cpu",
        "dtype": "float32", "max_new_tokens": COMMON["max_new_tokens"], "seed": 1,
    }  # fmt: skip
    rows = []
    collect(CollectConfig(*models, **logged), root / "reference", progress=False)
    for number, spec in enumerate(specs):
        own = CollectConfig(
            *models, **logged, prefixes="cascade", rule=spec, num_draft_tokens=COMMON["num_draft_tokens"]
        )
        collect(own, root / f"own{number}", progress=False)
        for folder in (root / f"own{number}", root / "reference"):
            traces = open_traces(folder)
            found = skew.compare(
                traces, spec, named[spec], outputs, temperature=temperature, bootstrap=bootstrap,
                num_draft_tokens=COMMON["num_draft_tokens"],
            )  # fmt: skip
            rows += [{**row, "temperature": temperature} for row in found]
    return rows


def main() -> int:
    parser = flags(__doc__, ("cpu",), threads=None)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--verifier", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reference-path")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--temperatures", nargs="+", type=float, default=list(TEMPERATURES))
    options = parser.parse_args()
    prompts = read_prompts(options.prompts, reference_path=options.reference_path, limit=options.limit)
    rows = []
    for temperature in options.temperatures:
        with tempfile.TemporaryDirectory() as place:
            models = options.drafter, options.verifier
            rows += compare(models, prompts, options.rules, temperature, Path(place))
        for line in table([row for row in rows if row["temperature"] == temperature]):
            print(line, flush=True)
    own = [row for row in rows if row["on_policy"]]
    agree = sum(row["agrees"] for row in own)
    print(f"\non-policy: {agree} of {len(own)} quantities agree, {len(prompts)} prompts")
    keep(options, {"rows": rows}, {"seed": 0})
    return 0 if agree == len(own) else 1


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Acceptance of every rule as Markdown: counted, predicted on its own prefixes and on the references'."""
    lines = [
        f"\n| T = {rows[0]['temperature']:g}, n = {rows[0]['prompts']} | counted | predicted | relative | agrees "
        "| all three agree | teacher-forced | relative |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for spec in dict.fromkeys(row["rule"] for row in rows):
        own, forced = (
            [r for r in rows if r["rule"] == spec and r["on_policy"] is side] for side in (True, False)
        )
        mine, theirs = (
            next((r for r in part if r["quantity"] == "acceptance"), None) for part in (own, forced)
        )
        if mine is None or theirs is None:
            continue
        lines.append(
            f"| {spec} | {mine['counted']:.4f} | {mine['predicted']:.4f} | {_share(mine)} | "
            f"{'yes' if mine['agrees'] else 'no'} | {'yes' if all(r['agrees'] for r in own) else 'no'} | "
            f"{theirs['predicted']:.4f} | {_share(theirs)} |"
        )
    return lines


def _share(row: dict[str, Any]) -> str:
    return "-" if row["relative"] is None else f"{row['relative']:+.1%}"


if __name__ == "__main__":
    sys.exit(main())

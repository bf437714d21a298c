"""Sequence labels against plain generation: tokens written for labels, and by the verifier on its own, per second.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.label_speed --pair en-fr --limit 128 [--out FILE]

Train lines 23,001 on of Multi30k, temperature 0, at most 64 tokens. Both sides in seconds of the process's own CPU
time, since other work may share the machine, and both in turn (``--turns``). On its own: the verifier's greedy texts in
batches of ``--batch``, by transformers' ``generate`` as `collect` uses it for prefixes. Labels: ``collect --labels
sequence`` along those texts: the time in finishing texts, and all that labels add, scoring with it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import keep, study_flags
from deferral_train.collecting import CollectConfig, collect
from deferral_train.collecting.continuations import Verifier
from deferral_train.collecting.prefixes import FromModel
from deferral_train.decoding.pair import Pair, Settings, load_pair
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.pairs.prompts import Prompt, read_prompts

METRICS = ("sentence_bleu", "chrf1")
MOST = 64


def own_speed(pair: Pair, prompts: Sequence[Prompt], batch: int) -> tuple[int, float]:
    """Tokens that the verifier writes on its own in batches, and the seconds of CPU time."""
    source = FromModel("verifier", 0.0, MOST)
    encoded = sorted(pair.encode(prompts, Settings(max_new_tokens=MOST)), key=lambda one: len(one.input_ids))
    started, tokens = time.process_time(), 0
    for at in range(0, len(encoded), batch):
        tokens += sum(map(len, source(pair.models, encoded[at : at + batch], 0).tokens))
    return tokens, time.process_time() - started


def label_speed(pair: Pair, prompts: Sequence[Prompt], scores: dict[str, Any]) -> tuple[int, float, float]:
    """Tokens newly generated for labels, seconds in generating them, and seconds that labels add to collecting."""
    config = CollectConfig(
        prefixes="verifier", temperature=0.0, log_top_k=0, max_new_tokens=MOST, label_metric=METRICS,
        label_scales=(1.0, 1.0), labels="sequence",
    )  # fmt: skip
    written, seconds = 0, 0.0
    finish = Verifier.finish

    def timed(verifier: Verifier, *given: Any) -> Any:
        nonlocal written, seconds
        before, started = verifier.tally.tokens, time.process_time()
        found = finish(verifier, *given)
        written, seconds = (
            written + verifier.tally.tokens - before,
            seconds + time.process_time() - started,
        )
        return found

    Verifier.finish = timed  # type: ignore[method-assign]
    try:
        with_labels = _collected(config, pair, prompts, scores)
    finally:
        Verifier.finish = finish  # type: ignore[method-assign]
    bare = CollectConfig(prefixes="verifier", temperature=0.0, log_top_k=0, max_new_tokens=MOST)
    return written, seconds, with_labels - _collected(bare, pair, prompts, None)


def _collected(
    config: CollectConfig, pair: Pair, prompts: Sequence[Prompt], scores: dict[str, Any] | None
) -> float:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        collect(config, folder, progress=False, models=pair.models, prompts=prompts, scores=scores)
    return time.process_time() - started


def main() -> int:
    parser = study_flags(__doc__, "runs/label-speed")
    parser.add_argument("--pair", default="en-fr", choices=("en-fr", "en-de"))
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    source, target = options.pair.split("-")
    folder = options.shared / "data" / "multi30k"
    prompts = read_prompts(
        folder / f"train.{source}.gz", "text", reference_path=folder / f"train.{target}.gz", start=23_000,
        limit=options.limit,
    )  # fmt: skip
    models = options.shared / "models" / f"multi30k-{options.pair}"
    pair = load_pair(str(models / "drafter"), str(models / "verifier"), options.device)
    scores = make_scorers(METRICS)
    own_speed(pair, prompts[:8], options.batch)  # warm
    rows = []
    for _ in range(options.turns):
        tokens, seconds = own_speed(pair, prompts, options.batch)
        written, generating, adding = label_speed(pair, prompts, scores)
        rows.append(
            {"own": tokens / seconds, "labels": written / generating, "labels_and_scores": written / adding}
        )
    best = {name: max(row[name] for row in rows) for name in rows[0]}
    shares = {name: best[name] / best["own"] for name in ("labels", "labels_and_scores")}
    print(
        f"{written:,} tokens for labels, {tokens:,} on its own; tokens a second of CPU time, best of {len(rows)} turns"
    )
    print(" ".join(f"{name} {value:,.0f}" for name, value in best.items()), shares)
    conditions = {"pair": options.pair, "prompts": len(prompts), "batch": options.batch, "written": written}
    keep(
        options,
        {"study": "label_speed", **conditions, "turns": rows, "best": best, "shares": shares},
        {"seed": 0},
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

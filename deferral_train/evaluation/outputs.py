"""More measures of decoded outputs than ``decode`` takes by itself: any metric of :mod:`quality`, and the
log-likelihood of each text under the verifier, which needs no reference.

The likelihood is that of the emitted ids, end of sequence included, under the verifier's own distribution
(temperature 1, no truncation) given the prompt: log p(x) = sum_t log p(x_t | prompt, x_<t), in nats. A rule that
keeps tokens the verifier finds unlikely shows here before a reference-based metric moves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deferral_train import provenance
from deferral_train.collecting.scoring import make_inputs, score
from deferral_train.decoding.outputs import METRICS, OUTPUTS, SUMMARY, read_lines
from deferral_train.errors import InputError
from deferral_train.evaluation.quality import (
    RIGHT,
    check_metric,
    gold,
    judged,
    per_prompt,
    refuse_without,
    verdicts,
)
from deferral_train.evaluation.sql import reasons
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.load import ModelPair
from deferral_train.pairs.prompts import Prompt
from deferral_train.provenance import read_object
from deferral_train.redaction import redacted_text

LIKELIHOOD = "log_likelihood"
BATCH = 16


def check_metrics(metrics: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Refuse what could not be computed, before anything is decoded.

    Raises:
        InputError: an unknown metric, or one that needs references where prompts have none.
    """
    for metric in metrics:
        if metric == LIKELIHOOD:
            continue
        check_metric(metric)
        refuse_without(metric, [gold(metric, vars(prompt)) for prompt in prompts])


def score_outputs(
    folder: str | Path,
    metrics: Sequence[str],
    pair: ModelPair | None,
    prompts: Sequence[Prompt],
    *,
    chat: str = "auto",
) -> dict[str, Any]:
    """Score the first repetition of a decode folder; writes ``metrics.jsonl`` and adds means to ``summary.json``.

    Args:
        folder: of a finished ``decode``.
        metrics: as :func:`deferral_train.evaluation.quality.per_prompt` takes them, or ``log_likelihood``.
        pair, prompts: what was decoded with, and from; only read for the likelihood, else None will do.
        chat: as it was decoded.

    Returns:
        the summary; ``quality`` of each rule has a mean per prompt of every metric in [0, 1], and for
        ``log_likelihood`` nats a token over all tokens; ``wrong`` has the reasons of metrics that run a text, counted.

    Raises:
        InputError: as :func:`check_metrics`.
    """
    root = Path(folder)
    rows = [row for row in read_lines(root / OUTPUTS) if row["repetition"] == 0]
    check_metrics(metrics, prompts)
    summary = read_object(root / SUMMARY, "decode again")
    if summary is None:
        raise InputError(f"{root} holds no {SUMMARY}; finish the decode run first")
    scored = [{"rule": row["rule"], "id": row["id"], "tokens": len(row["tokens"])} for row in rows]
    wrong: dict[str, dict[str, dict[str, int]]] = {}
    for metric in metrics:
        if judged(metric):
            found = verdicts(metric, [row["text"] for row in rows], [gold(metric, row) for row in rows])
            values: Any = [float(verdict == RIGHT) for verdict in found]
            for label in summary["rules"]:
                own_verdicts = (verdict for row, verdict in zip(rows, found) if row["rule"] == label)
                wrong.setdefault(label, {})[redacted_text(metric)] = reasons(own_verdicts)
        else:
            values = _values(metric, rows, pair, prompts, chat)
        for line, value in zip(scored, values):
            line[redacted_text(metric)] = float(value)
    provenance.write_text(root / METRICS, "".join(json.dumps(line) + "\n" for line in scored))
    for label, rule in summary["rules"].items():
        own = [line for line in scored if line["rule"] == label]
        rule["quality"] |= {name: _mean(name, own) for name in map(redacted_text, metrics)}
        if label in wrong:
            rule["wrong"] = wrong[label]
    provenance.write_json(root / SUMMARY, summary)
    return summary


def _values(
    metric: str,
    rows: Sequence[Mapping[str, Any]],
    pair: ModelPair | None,
    prompts: Sequence[Prompt],
    chat: str,
) -> Sequence[float] | np.ndarray:
    if metric != LIKELIHOOD:
        return per_prompt(metric, [row["text"] for row in rows], [gold(metric, row) for row in rows])
    assert pair is not None
    encoded = encode_prompts(pair.tokenizer, prompts, is_encoder_decoder=pair.is_encoder_decoder, chat=chat)
    ids = {prompt.id: prompt.input_ids for prompt in encoded.kept}
    # Many rules write the same text; each is scored once.
    wanted = list(dict.fromkeys((row["id"], tuple(row["tokens"])) for row in rows))
    found = log_likelihoods(
        pair.verifier, [ids[name] for name, _ in wanted], [list(t) for _, t in wanted], pair.vocab_size
    )
    known = dict(zip(wanted, found))
    return [known[row["id"], tuple(row["tokens"])] for row in rows]


def _mean(metric: str, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over prompts; of the likelihood over tokens. None where there is nothing."""
    over = sum(line["tokens"] for line in lines) if metric == LIKELIHOOD else len(lines)
    return sum(line[metric] for line in lines) / over if over else None


@torch.inference_mode()
def log_likelihoods(
    model: Any, prompts: Sequence[list[int]], outputs: Sequence[list[int]], vocab_size: int
) -> list[float]:
    """log p(output | prompt) of each text in nats, sums in float64.

    Args:
        model: a causal or encoder-decoder language model of transformers.
        prompts, outputs: token ids; an empty output has log-likelihood 0.
        vocab_size: columns from here on are padding and no tokens.
    """
    found = [0.0] * len(outputs)
    order = sorted((i for i in range(len(outputs)) if outputs[i]), key=lambda i: -len(outputs[i]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        inputs = make_inputs(model, [prompts[i] for i in batch], [outputs[i] for i in batch], model.device)
        logits = score(model, inputs).logits.index_select(0, inputs.rows)[:, :vocab_size].float()
        tokens = torch.tensor([token for i in batch for token in outputs[i]], device=logits.device)
        chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
        parts = chosen.double().cpu().split([len(outputs[i]) for i in batch])
        for i, part in zip(batch, parts):
            found[i] = float(part.sum())
    return found

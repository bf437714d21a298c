"""Proposes how to draft: plans replayed on logged texts, priced with seconds measured on this machine.

The number of draft tokens, K and the drafters are chosen on one half of the prompts; what is said of the choice is
of the other half. Ours; at temperature 0 and lenience 1 the replayed calls are exact under ``lossless`` and an
estimate under lossy rules, whose text depends on the plan (``drafting/replay.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deferral_train.decoding import Pair
from deferral_train.decoding.drafting.plan import Plan
from deferral_train.decoding.drafting.replay import UNKNOWN, Path, fit_ending, replay
from deferral_train.decoding.drafting.spec import drafting_from_spec
from deferral_train.decoding.drafting.speed import SpeedModel
from deferral_train.decoding.pair import Settings
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import Interval, PromptBootstrap, Redraws
from deferral_train.evaluation.distributions import deferral_and_rejection
from deferral_train.evaluation.positions import read_positions
from deferral_train.evaluation.speed import measure_speed
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules.base import Rule
from deferral_train.traces import Traces

TOKENS, COPIES = (1, 2, 3, 4, 5, 6, 8, 10), 8
ENDLESS = 1 << 30


@dataclass(frozen=True)
class Way:
    """A way to draft: ``num_draft_tokens`` of one drafter, or a spec of ``--drafting``."""

    family: str
    flags: str
    plan: Plan
    num_draft_tokens: int | None = None
    drafting: str | None = None


def ways(rule: Rule) -> Iterator[Way]:
    """All that are tried for a rule; where it reads the drafter's confidence, no copies that no drafter reviewed."""
    yield from map(_alone, TOKENS)
    specs = {"drafter below which Max-Gram copies": [f"vertical:tokens={n},copies={COPIES}" for n in TOKENS]}
    if rule.is_lossless or not (rule.reads_drafter_confidence or "drafter_hidden" in rule.needs):
        specs["drafter, then copies"] = [f"horizontal:tokens={n},copies={COPIES}" for n in TOKENS]
        specs["copies below and behind the drafter"] = [f"both:tokens={n},copies={COPIES}" for n in TOKENS]
        specs["Max-Gram alone"] = [f"max_gram:tokens={n}" for n in (4, 10)]
    for family, members in specs.items():
        for spec in members:
            yield Way(family, f"--drafting {spec}", drafting_from_spec(spec).plan, drafting=spec)


def propose_for(
    pair: Pair,
    prompts: Sequence[Prompt],
    rule: Rule,
    traces: Traces,
    *,
    num_draft_tokens: int = Settings.num_draft_tokens,
    temperature: float = 0.0,
    counted: Mapping[str, int] | None = None,
    redraws: Redraws = Redraws(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """:func:`propose` for a pair on this machine: its texts from traces, its speed measured now.

    Args:
        prompts: of the traces, or some of them.
        traces: best of the rule's own prefixes (``cascade:<rule>``).
        num_draft_tokens: in use, to compare with.
        counted: drafter passes by prompt id with these draft tokens, where they were decoded; they say how readily
            the drafter ends a text behind a wrong token.
        redraws: of prompts, for intervals; its seed also draws acceptances where the temperature is not 0.

    Raises:
        InputError: texts that such decoding does not write; a prompt that does not fit, no prompt in common, or a
            single one.
    """
    _check_texts(traces, temperature)
    here = set(traces.prompt_ids)
    room = traces.manifest.settings.get("max_new_tokens") or 0
    encoded = pair.encode(prompts, Settings(max_new_tokens=room))
    ids = {one.id: one.input_ids for one in encoded if one.id in here}
    separate, eos = pair.models.is_encoder_decoder, pair.models.eos_ids
    paths = paths_of(traces, rule, ids, separate, temperature=temperature, seed=redraws.seed)
    ending = 0.0
    if counted is not None and all(name in counted for name in ids):
        ending = fit_ending(_alone(num_draft_tokens).plan, paths, eos, sum(counted[name] for name in ids))
    found = propose(
        paths,
        rule,
        measure_speed(pair, prompts, rule, temperature),
        eos,
        used=num_draft_tokens,
        ending=[ending],
        bootstrap=redraws.replicates,
        seed=redraws.seed,
    )
    conditions = {
        "device": str(pair.models.device),
        "threads": torch.get_num_threads(),
        "batch_size": 1,
        "temperature": temperature,
        "lenience": 1.0,
    }
    return found | {"conditions": conditions}


def _check_texts(traces: Traces, temperature: float) -> None:
    manifest = traces.manifest
    if manifest.prefixes.partition(":")[0] not in ("verifier", "cascade"):
        raise InputError(
            f"drafting: the traces hold texts of the {manifest.prefixes}, which decoding does not write; collect with "
            "--prefixes cascade --rule RULE, or verifier for lossless"
        )
    if manifest.temperature != temperature:
        raise InputError(
            f"drafting: temperature is {temperature:g}, the traces' texts were written at {manifest.temperature:g}; "
            f"collect again with --temperature {temperature:g}"
        )


def paths_of(
    traces: Traces,
    rule: Rule,
    prompts: Mapping[str, Sequence[int]],
    separate: bool,
    *,
    temperature: float | None = None,
    seed: int = 0,
) -> list[Path]:
    """Logged texts as paths of one drafter.

    Args:
        traces: best of the rule's own prefixes (``cascade:<rule>``).
        rule: decides which drafted tokens stand.
        prompts: token ids of each prompt that is wanted.
        separate: encoder-decoder: the text does not continue the prompt.
        seed: of acceptances, which are drawn where the temperature is not 0.

    Raises:
        InputError: no prompt in common.
    """
    limit = traces.manifest.settings.get("max_new_tokens") or ENDLESS
    table = read_positions(
        traces, rule.needs, truth="verifier", temperature=temperature, with_candidates=True
    )
    draw, found = np.random.default_rng(seed), []
    for block in table.blocks():
        rejection = deferral_and_rejection(rule, block)[1][:, 0]
        stands = rejection <= draw.random(len(rejection))
        tokens, guesses = (block.summary[name].numpy() for name in ("token", "drafter_argmax"))
        if table.temperature > 0:
            guesses = np.where(stands, tokens, UNKNOWN)
        names = table.prompt_ids[block.prompts]
        for name, start, length in zip(names, block.layout.starts, block.layout.lengths):
            rows = slice(int(start), int(start + length))
            if name in prompts:
                found.append(
                    Path(
                        prompts[name],
                        tokens[rows].tolist(),
                        [guesses[rows].tolist()],
                        [stands[rows].tolist()],
                        limit,
                        separate,
                    )
                )
    if not found:
        raise InputError("drafting: the traces and the prompts have no id in common; give what was collected")
    return found


def propose(
    paths: Sequence[Path],
    rule: Rule,
    speed_model: SpeedModel,
    eos: Sequence[int],
    *,
    used: int | None = None,
    ending: Sequence[float] = (),
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The way to draft that is expected to be fastest, batch 1, and whether it beats the verifier alone.

    Args:
        paths: of at least two prompts; the even ones choose, the odd ones judge.
        speed_model: what replayed work is priced with.
        eos: ids that end a text.
        used: draft tokens in use, to compare with.
        ending: see :func:`deferral_train.decoding.drafting.replay.replay`.
        bootstrap: redraws of prompts for intervals.

    Returns:
        ``num_draft_tokens`` or ``drafting`` (the other is None), ``flags`` for the command line, ``speed`` predicted
        against the verifier alone, ``used`` (the same for the draft tokens in use), ``beats_verifier`` (the interval
        lies above 1; None without one), ``families`` (the best of each family on the choosing half), and ``prompts``.

    Raises:
        InputError: fewer than two paths.
    """
    if len(paths) < 2:
        raise InputError(f"drafting: {len(paths)} prompt(s); give at least two, to choose on and to judge on")
    choosing, judging = paths[::2], paths[1::2]
    price = _Price(speed_model, eos, ending)
    rated = [(price.speed(way, choosing), way) for way in ways(rule)]
    families: dict[str, tuple[float, Way]] = {}
    for speed, way in rated:
        if way.family not in families or speed > families[way.family][0]:
            families[way.family] = (speed, way)
    best = max(families.values(), key=lambda pair: pair[0])[1]
    redraws = Redraws(bootstrap, seed).over(len(judging))
    speed = price.interval(best, judging, redraws)
    found: dict[str, Any] = {
        "num_draft_tokens": best.num_draft_tokens,
        "drafting": best.drafting,
        "flags": best.flags,
        "speed": speed.as_dict(),
        "beats_verifier": None if speed.low is None else bool(speed.low > 1),
        "used": None,
        "families": [
            {"family": way.family, "flags": way.flags, "speed": rate} for rate, way in families.values()
        ],
        "prompts": {"chosen_on": len(choosing), "judged_on": len(judging)},
    }
    if used is not None:
        interval = price.interval(_alone(used), judging, redraws)
        found["used"] = {"num_draft_tokens": used, "speed": interval.as_dict()}
    return found


def _alone(tokens: int) -> Way:
    plan = Plan([[tokens, 0], [0, 0]], max_gram=None)
    return Way("drafter alone", f"--num-draft-tokens {tokens}", plan, num_draft_tokens=tokens)


@dataclass(frozen=True)
class _Price:
    """Replays ways to draft and says what they cost."""

    speed_model: SpeedModel
    eos: Sequence[int]
    ending: Sequence[float]

    def seconds(self, way: Way, paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
        """Of each prompt, by the verifier alone and by the cascade."""
        cascade = way.num_draft_tokens is None
        work = [replay(way.plan, path, self.eos, self.ending) for path in paths]
        own = np.array([self.speed_model.of(one, cascade) for one in work])
        return np.array([self.speed_model.alone(one.tokens) for one in work]), own

    def speed(self, way: Way, paths: Sequence[Path]) -> float:
        """Against the verifier alone."""
        alone, own = self.seconds(way, paths)
        return float(alone.sum() / own.sum())

    def interval(self, way: Way, paths: Sequence[Path], redraws: PromptBootstrap) -> Interval:
        return redraws.ratio(*self.seconds(way, paths))

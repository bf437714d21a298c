"""Learning from the cascade's own prefixes (DAgger, Ross et al., 2011): collect with the current head, refit, repeat.

A head fitted on reference prefixes is served on prefixes that its own cascade wrote. Each round here collects these on
the fit prompts, refits on everything collected so far, and reports the training-serving skew on held-out prompts: what
the latest traces predict of the head's work against what decoding counts, and the head's error on prefixes of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deferral_train.collecting.api import collect
from deferral_train.collecting.config import CollectConfig
from deferral_train.decoding.decode import DecodeConfig, decode
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.pair import Pair
from deferral_train.errors import InputError
from deferral_train.evaluation import skew
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.prompts import Prompt
from deferral_train.traces import Traces, open_traces
from deferral_train.training.config import FitConfig
from deferral_train.training.datamodule import TraceDataModule
from deferral_train.training.fit import fit
from deferral_train.training.scoring import score

LABEL = "head"


@dataclass(frozen=True)
class Rounds:
    """Settings that stay the same in every round.

    Attributes:
        collecting: how to collect; ``prefixes``, ``rule`` and prompts are set here. Its temperature and
            ``num_draft_tokens`` must be those of ``decoding``.
        fitting: how to fit; ``train`` and ``val`` are set here. Prefixes of a cascade hold no gold tokens, so that
            ``truth`` must be one that the models give (verifier, teacher).
        decoding: how to decode the held-out prompts.
        alpha: operating point of the head's rule.
        out: folder.
    """

    collecting: CollectConfig
    fitting: FitConfig
    decoding: DecodeConfig
    alpha: float
    out: Path

    def __post_init__(self) -> None:
        if self.fitting.truth == "reference":
            raise InputError(
                "truth='reference': a cascade's own prefixes have no gold tokens; use verifier or teacher"
            )


def learn(
    pair: Pair, fit_prompts: Sequence[Prompt], held_out: Sequence[Prompt], settings: Rounds, rounds: int
) -> list[dict[str, Any]]:
    """Fit on reference prefixes, then ``rounds`` times on the union with the current head's own prefixes.

    Resumable: finished collections, fits and decodings are taken as they are.

    Returns:
        one record per fitted head, the first before any round: ``prefixes`` of the latest traces it was fitted on,
        ``skew`` (rows of :func:`deferral_train.evaluation.skew.compare`: predicted by held-out traces with these
        prefixes, counted with this head), ``trained`` and ``served``: its scalars on held-out prefixes of its
        training and of its own cascade. Every head lies in ``out/round-R/head``.
    """
    train, records = [_collected(pair, fit_prompts, settings, "fit-0", None)], []
    latest = _collected(pair, held_out, settings, "held-out-0", None)
    head: DeferralHead | None = None
    for number in range(rounds + 1):
        folder = settings.out / f"round-{number}"
        head = _fitted(settings, train, latest, folder / "fit", head)
        head.save_pretrained(folder / "head")
        spec = f"learned:head={folder / 'head'},alpha={settings.alpha:g}"
        own = _collected(pair, held_out, settings, f"held-out-{number + 1}", spec)
        records.append(
            {
                "prefixes": latest.manifest.prefixes if number else "reference",
                "rows": sum(map(len, train)),
                "skew": _skew(pair, held_out, settings, head, latest, folder / "decode"),
                "trained": _scalars(settings, train, latest, head),
                "served": _scalars(settings, train, own, head),
            }
        )
        if number < rounds:
            train.append(_collected(pair, fit_prompts, settings, f"fit-{number + 1}", spec))
        latest = own
    return records


def _collected(
    pair: Pair, prompts: Sequence[Prompt], settings: Rounds, name: str, spec: str | None
) -> Traces:
    config = replace(settings.collecting, prefixes="reference" if spec is None else "cascade", rule=spec)
    folder = settings.out / "traces" / name
    collect(config, folder, progress=False, models=pair.models, prompts=prompts)
    return open_traces(folder)


def _fitted(
    settings: Rounds, train: Sequence[Traces], val: Traces, out: Path, initial: DeferralHead | None
) -> DeferralHead:
    return fit(replace(settings.fitting, train=list(train), val=val), out, initial=initial).head


def _scalars(
    settings: Rounds, train: Sequence[Traces], traces: Traces, head: DeferralHead
) -> dict[str, float]:
    """The tracker's averages of a fitted head on traces; the plug-in beside is chosen on the fit traces."""
    asked = settings.fitting
    data = TraceDataModule(
        list(train),  # type: ignore[arg-type]  # opened traces pass; the signature is what YAML can say
        traces,  # type: ignore[arg-type]
        truth=asked.truth,
        temperature=asked.temperature,
        alphas=asked.alphas,
    )
    data.prepare(head)
    scalars = score(head, data.tables["val"], data.alphas)
    return {name: value for name, value in scalars.items() if "/" not in name}


def _skew(
    pair: Pair, prompts: Sequence[Prompt], settings: Rounds, head: DeferralHead, traces: Traces, out: Path
) -> list[dict[str, Any]]:
    rule = learned_rule(head, settings.alpha)
    decode(pair, prompts, {LABEL: rule}, settings.decoding, out)
    return skew.compare(
        traces,
        LABEL,
        rule,
        read_lines(out / OUTPUTS),
        temperature=settings.decoding.settings.temperature,
        num_draft_tokens=settings.decoding.settings.num_draft_tokens,
    )

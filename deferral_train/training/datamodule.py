"""TraceDataModule: traces preloaded as columns, batches as index blocks, splits by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.pairs.load import output_matrix
from deferral_train.traces import Traces, open_traces, split_prompts
from deferral_train.traces.judged import check_labels, is_judge, judges_sequences, resolve_truth
from deferral_train.traces.sequence import check_one_kind, is_sequence, labelled_rows, sequence_gap
from deferral_train.training import baselines
from deferral_train.training.belonging import refuse_other_candidates, refuse_shared_prompts, refuse_strangers
from deferral_train.training.loader import TableLoader
from deferral_train.training.metrics import check_alphas
from deferral_train.training.preparation import fit_memory
from deferral_train.training.table import fit_table, labelled, score_table

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
SCORE_ROWS = 65_536


class TraceDataModule(pl.LightningDataModule):
    """Fit, validation and test columns of a head, from trace folders.

    Args:
        train: trace folder to fit on, or several whose rows are taken together (of reference texts and of a
            cascade's own prefixes); baselines, recalibration and memory are fitted on the first.
        val: trace folder to validate on; without it ``val_fraction`` of the prompts of ``train``.
        test: trace folder to test on; without it the validation traces.
        val_fraction: share of the prompts set aside where ``val`` is not given.
        truth: what labels the gap: reference, verifier, teacher or exact; for a judge head judge:tau=X, judge:rate=R
            (tau is then a quantile of the fit traces' scores) or, at the draft stage, acceptance.
        temperature: of the sampling distributions; None is the traces' own.
        alphas: ascending grid on which regret is tracked.
        batch_size: rows per step and process.
        seed: of the split and of the batch order.
        pair_training: record of what the pair was trained on (file or folder of the trained pair); prompts
        found
            there are refused.
        verifier: checkpoint whose output matrix features read (embeddings of tokens).
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | None = None,
        test: str | None = None,
        val_fraction: float = 0.1,
        truth: str = "reference",
        temperature: float | None = None,
        alphas: Sequence[float] = ALPHAS,
        batch_size: int = 4096,
        seed: int = 0,
        pair_training: str | None = None,
        verifier: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["train", "val", "test", "verifier"])
        self.verifier: Any = verifier  # or the matrix itself, from Python
        first, *further = train if isinstance(train, list | tuple) else [train]
        self.folders = {"train": first, "val": val, "test": test}
        self.further: list[Any] = further  # folders, and once ``traces`` was read the opened traces
        self.val_fraction, self.truth, self.temperature = val_fraction, truth, temperature
        self.alphas, self.batch_size, self.seed = check_alphas(alphas), batch_size, seed
        self.pair_training = pair_training
        self._traces: dict[str, Traces] | None = None
        self.tables: dict[str, dict[str, Tensor]] = {}
        self.plug_ins: list[str] = []

    @property
    def traces(self) -> dict[str, Traces]:
        """Opened traces of the three splits; opening checks overlap before anything is loaded."""
        if self._traces is None:
            self._traces = self._open()
        return self._traces

    def _open(self) -> dict[str, Traces]:
        given = {name: _opened(source) for name, source in self.folders.items() if source is not None}
        self.further = [_opened(source) for source in self.further]
        if "val" not in given:
            parts = split_prompts(given["train"], [1 - self.val_fraction, self.val_fraction], self.seed)
            given["train"], given["val"] = parts
            aside = set(given["val"].prompt_ids)
            self.further = [
                part.select_prompts([i for i in part.prompt_ids if i not in aside]) for part in self.further
            ]
        given.setdefault("test", given["val"])
        refuse_strangers(given["train"], self._others(given), self.truth, self.temperature)
        judged = {name: given[name] for name in ("val", "test")}
        refuse_shared_prompts([given["train"], *self.further], judged)
        if self.pair_training is not None:
            every = [*given.values(), *self.further]
            refuse_pair_training(self.pair_training, every)
        return given

    def _others(self, traces: Mapping[str, Traces]) -> list[tuple[str, Traces]]:
        """Every set but the first to fit on, with the name of its flag."""
        return [("train", part) for part in self.further] + [(name, traces[name]) for name in ("val", "test")]

    def prepare(self, head: DeferralHead) -> None:
        """Load the columns that ``head`` needs; checks everything before training starts."""
        fit = self.traces["train"]
        self.truth = resolve_truth(self.truth, fit)
        if is_judge(self.truth) and not judges_sequences(self.truth):
            every = (fit, *self.further, self.traces["val"], self.traces["test"])
            check_labels([part.manifest.labels for part in every])
        every = [fit, *self.further, self.traces["val"], self.traces["test"]]
        if is_sequence(self.truth) or judges_sequences(self.truth):
            check_one_kind(every)
            self._in_units_of_the_labels(every[: 1 + len(self.further)])
        if head.inputs.lookups is not None and head.inputs.lookups.width:
            head.inputs.lookups.set_matrix(self._matrix(fit))
        if self.further and head.inputs.memory is not None:
            raise InputError(
                "memory features count one trace folder; leave them out or give one --data.train"
            )
        if head.needs_candidates:
            refuse_other_candidates(fit, self._others(self.traces))
        fit_memory(head, fit)
        parts = [fit_table(part, head, self.truth, self.temperature) for part in (fit, *self.further)]
        names = baselines.plug_ins(head.stage)
        rows = labelled(fit, self.truth)
        best = baselines.best_plug_in(fit, parts[0]["z"], self.alphas, self.temperature, names, rows)
        joined = (
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if self.further else {}
        )
        self.tables["train"] = joined or parts[0]
        self.plug_ins = baselines.describe(best)
        fixed = {"opt": baselines.opt_rules(self.alphas), "plug_in": best}
        for name in ("val", "test"):
            if name == "test" and self.traces["test"] is self.traces["val"]:
                self.tables["test"] = self.tables["val"]
                continue
            self.tables[name] = score_table(self.traces[name], head, self.truth, self.temperature, fixed)

    def _in_units_of_the_labels(self, fitted: Sequence[Traces]) -> None:
        """The default grid of alphas is for losses of a token; sequence gaps are as small as one token in a text."""
        if self.alphas == list(ALPHAS):
            gaps = torch.cat([sequence_gap(part)[labelled_rows(part)] for part in fitted])
            unit = float(gaps.std()) if len(gaps) > 1 else 0.0
            if not unit:
                raise InputError(
                    f"labels: all {len(gaps)} sequence gaps are {float(gaps[0]):g}, so that no place teaches anything; "
                    "label more prompts, by a metric that tells the finished texts apart, or train the pair longer"
                )
            self.alphas = check_alphas([float(f"{alpha * unit:.4g}") for alpha in self.alphas])

    @property
    def matrix_width(self) -> int:
        """Width D of the verifier's output matrix; 0 where none was named."""
        if self.verifier is None:
            return 0
        self.verifier = self._matrix(self.traces["train"])
        return int(self.verifier.shape[1])

    def _matrix(self, traces: Traces) -> Tensor:
        """The verifier's output matrix [V, D]: given, or of the checkpoint that is named."""
        if isinstance(self.verifier, Tensor):
            return self.verifier
        recorded = traces.manifest.pair.get("verifier")
        if self.verifier is None:
            raise InputError(
                "data.verifier: features read the verifier's output matrix; name the folder of its checkpoint, or "
                "features without embedding and argmax_cosine"
            )
        return output_matrix(self.verifier, recorded if isinstance(recorded, dict) else {})

    def setup(self, stage: str) -> None:
        if not self.tables:
            assert self.trainer is not None
            head = self.trainer.lightning_module.head
            assert isinstance(head, DeferralHead)
            self.prepare(head)

    def _loader(self, name: str, batch_size: int, seed: int | None) -> TableLoader:
        trainer = self.trainer
        if trainer is None:
            return TableLoader(self.tables[name], batch_size, seed)
        return TableLoader(
            self.tables[name],
            batch_size,
            seed,
            trainer.global_rank,
            trainer.world_size,
            # Overfitting some batches on purpose means the same ones in every epoch.
            lambda: 0 if getattr(trainer, "overfit_batches", 0) else trainer.current_epoch,
        )

    def train_dataloader(self) -> TableLoader:
        return self._loader("train", self.batch_size, self.seed)

    def val_dataloader(self) -> TableLoader:
        return self._loader("val", SCORE_ROWS, None)

    def test_dataloader(self) -> TableLoader:
        return self._loader("test", SCORE_ROWS, None)


def _opened(source: Any) -> Traces:
    return source if isinstance(source, Traces) else open_traces(source)


def refuse_pair_training(record: str, traces: Sequence[Traces]) -> None:
    """Raise InputError where a trace's prompt was in the pair's training text: by id, or by a text of its own there."""
    from deferral_train.pairs.overlap import check_no_overlap, read_training_ids
    from deferral_train.pairs.prompts import Prompt

    seen = read_training_ids(record)
    content = set(seen["content"])
    for part in traces:
        check_no_overlap(seen, [Prompt(id=name, prompt="", reference=None) for name in part.prompt_ids])
        known = [name for name, digest in part.prompt_hashes.items() if digest in content]
        if known:
            raise InputError(
                f"{len(known)} of {len(part.prompt_ids)} prompts were in the pair's training text, first {known[0]}; "
                "use other prompts"
            )

"""Traces of a tabular language: distributions q, p and the true P per position are known, gold tokens are drawn from
P.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deferral_train.rules.summary import COMPUTED_FIELDS, summarize
from deferral_train.traces import Chunk, Manifest, Traces, TraceWriter, open_traces, prepare_folder
from deferral_train.traces.schema import SUMMARY_COLUMNS, TOKEN_COLUMNS

VOCABULARY = 12
PAIR = {"drafter": {"weights": "d"}, "verifier": {"weights": "v"}, "tokenizer": "t"}


class Language:
    """N positions in P prompts; the verifier is closer to the truth, the drafter overconfident in places."""

    def __init__(self, prompts: int = 60, seed: int = 0, shortest: int = 5, longest: int = 40) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest, (prompts,), generator=generator)
        self.prompt = torch.repeat_interleave(torch.arange(prompts), lengths)
        self.position = torch.cat([torch.arange(int(length)) for length in lengths])
        n = len(self.prompt)
        truth = torch.randn(n, VOCABULARY, generator=generator) * 2
        hard = torch.rand(n, 1, generator=generator) < 0.4
        self.verifier_logits = truth + 0.5 * torch.randn(n, VOCABULARY, generator=generator)
        noise = torch.where(hard, 2.0, 0.4) * torch.randn(n, VOCABULARY, generator=generator)
        self.drafter_logits = (truth + noise) * torch.where(hard, 1.6, 1.0)
        self.P, self.q, self.p = (
            torch.softmax(logits, -1) for logits in (truth, self.drafter_logits, self.verifier_logits)
        )
        self.gold = torch.multinomial(self.P, 1, generator=generator).squeeze(1)

    def columns(self, temperature: float, top_k: int) -> dict[str, np.ndarray]:
        summary = summarize(
            self.drafter_logits,
            self.verifier_logits,
            temperature=temperature,
            token=self.gold,
            fields=COMPUTED_FIELDS,
        )
        columns = {name: summary[name] for name in (*SUMMARY_COLUMNS, *TOKEN_COLUMNS)}
        columns |= {"prompt": self.prompt, "position": self.position, "gold": self.gold}
        columns |= self._truth() | (self._candidates(top_k) if top_k else {})
        return {name: values.numpy() for name, values in columns.items()}

    def _truth(self) -> dict[str, torch.Tensor]:
        distributions = {"drafter": self.q, "verifier": self.p}
        columns = {}
        for role, distribution in distributions.items():
            at_argmax = self.P.gather(1, distribution.argmax(1, keepdim=True)).squeeze(1)
            columns[f"truth_{role}_argmax"] = at_argmax
            columns[f"truth_{role}_log"] = -(self.P * distribution.log()).sum(1)
            columns[f"truth_{role}_prob"] = (self.P * distribution).sum(1)
        return columns

    def _candidates(self, k: int) -> dict[str, torch.Tensor]:
        columns = {}
        for role, distribution in (("drafter", self.q), ("verifier", self.p)):
            top = distribution.topk(k, dim=1)
            columns[f"{role}_top_ids"] = top.indices
            columns[f"{role}_tail"] = 1 - top.values.sum(1)
            for other, of in (("drafter", self.q), ("verifier", self.p)):
                columns[f"{role}_top_{other}_logprobs"] = of.gather(1, top.indices).log()
        return columns

    def write(self, folder: Path, temperature: float = 1.0, top_k: int = 0, chunks: int = 3) -> Traces:
        count = int(self.prompt.max()) + 1
        parts = np.array_split(np.arange(count), chunks)
        manifest = Manifest(
            pair=PAIR,
            prefixes="reference",
            prompt_ids=tuple(f"p{number}" for number in range(count)),
            chunks=tuple(Chunk(i, i, (tuple(int(n) for n in part),)) for i, part in enumerate(parts)),
            temperature=temperature,
            top_k=top_k,
            truth="exact",
        )
        writer = TraceWriter(str(folder), manifest)
        columns = self.columns(temperature, top_k)
        for chunk in prepare_folder(str(folder), manifest):
            inside = np.isin(columns["prompt"], chunk.prompts)
            writer.write(chunk, {name: values[inside] for name, values in columns.items()})
        return open_traces(folder)

"""Streaming re-translation: the source grows word by word, and each time the text is decoded anew.

    python examples/retranslation/retranslate.py --model V --sources test.en.gz --limit 50 --bias 0.2 --hidden 2

Two ways side by side: from scratch, and with the previous output as the draft, reviewed in one pass under the rule
`biased` (self-speculative biased decoding, arXiv 2509.21740). Counts verifier passes, times both by turns, and says
how much of what a reader saw was replaced later (normalised erasure). --hidden keeps the last tokens of every
unfinished text off the display; they stay in the draft. With references (--reference-path) BLEU of the final texts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deferral_train import InputError, cascade_generate, make_rule
from deferral_train.decoding.drafting import GivenDraft
from deferral_train.decoding.drafting.given import displayed, normalised_erasure
from deferral_train.pairs.load import load_models
from deferral_train.pairs.prompts import Prompt, read_prompts


@dataclass
class Way:
    """One way to re-translate, and what it came to."""

    name: str
    bias: float | None  # None: from scratch
    passes: int = 0
    updates: int = 0
    seconds: float = 0.0
    outputs: list[list[int]] = field(default_factory=list)  # of the source at hand, update by update
    erasure: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub id of an encoder-decoder model")
    parser.add_argument("--sources", required=True, help="text file, a source a line")
    parser.add_argument("--reference-path", help="text file, a translation a line")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--bias", type=float, default=0.2)
    parser.add_argument("--hidden", type=int, default=2, help="last tokens kept off the display")
    parser.add_argument("--words", type=int, default=2, help="words that arrive at a time")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def growing(text: str, words: int) -> list[str]:
    """The source as it arrives."""
    parts = text.split()
    return [" ".join(parts[:end]) for end in range(words, len(parts), words)] + [text]


def update(model: Any, tokenizer: Any, source: str, way: Way, most: int) -> None:
    """Translate the source at hand anew."""
    inputs = tokenizer(source, return_tensors="pt").to(model.device)
    before = way.outputs[-1] if way.outputs and way.bias is not None else []
    rule = make_rule("lossless") if way.bias is None else make_rule("biased", bias=way.bias)
    began = time.perf_counter()
    output = model.generate(
        **inputs,
        custom_generate=cascade_generate,
        drafter=GivenDraft([before]),
        rule=rule,
        do_sample=False,
        max_new_tokens=most,
        return_dict_in_generate=True,
    )
    way.seconds += time.perf_counter() - began
    way.passes += output.stats.verifier_passes
    way.updates += 1
    emitted = output.sequences[0, 1 : 1 + int(output.stats.emitted[0])].tolist()
    # Whether the text is finished is asked anew each time: its end is no part of the draft.
    way.outputs.append([token for token in emitted if token != tokenizer.eos_token_id])


def stream(
    model: Any, tokenizer: Any, prompt: Prompt, ways: Sequence[Way], options: argparse.Namespace
) -> None:
    """One source through all ways, by turns."""
    for way in ways:
        way.outputs = []
    for source in growing(prompt.prompt, options.words):
        for way in ways:
            update(model, tokenizer, source, way, options.max_new_tokens)
    for way in ways:
        last = len(way.outputs) - 1
        shown = [displayed(ids, options.hidden, place == last) for place, ids in enumerate(way.outputs)]
        way.erasure.append(normalised_erasure(shown))
        way.texts.append(way.outputs[-1])


def quality(tokenizer: Any, way: Way, prompts: Sequence[Prompt]) -> str:
    """BLEU of the final texts, where there are references."""
    if any(prompt.reference is None for prompt in prompts):
        return ""
    import sacrebleu

    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in way.texts]
    score = sacrebleu.corpus_bleu(texts, [[str(prompt.reference) for prompt in prompts]]).score
    return f", BLEU {score:.1f}"


def main() -> int:
    options = parse()
    torch.manual_seed(0)
    try:
        pair = load_models(options.model, options.model, options.device)
        prompts = read_prompts(options.sources, reference_path=options.reference_path, limit=options.limit)
        ways = [Way("from scratch", None), Way(f"biased, {options.bias:g}", options.bias)]
        for prompt in prompts:
            stream(pair.verifier, pair.tokenizer, prompt, ways, options)
    except InputError as error:
        raise SystemExit(f"retranslate: {error}") from None
    for way in ways:
        erasure = sum(way.erasure) / len(way.erasure)
        print(
            f"{way.name:<14} {way.passes / way.updates:6.2f} verifier passes and "
            f"{1000 * way.seconds / way.updates:6.1f} ms an update, normalised erasure {erasure:.3f}"
            + quality(pair.tokenizer, way, prompts)
        )
    scratch, biased = ways
    same = sum(a == b for a, b in zip(scratch.texts, biased.texts))
    print(
        f"passes {scratch.passes / biased.passes:.2f} times fewer, time {scratch.seconds / biased.seconds:.2f} times "
        f"shorter; {same} of {len(prompts)} final texts are those from scratch"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Answer prompts from standard input, one per line, with a pair and an exported head; text streams as it is decided.

    python examples/serve/serve.py --drafter D --verifier V --head checkpoints/my-head < prompts.txt

Answers go to standard output, counts to standard error. The head's stored alpha is used unless --alpha is given;
without --head the output is exactly the verifier's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TextIO

from transformers import TextStreamer

from deferral_train import DeferralHead, InputError, load_pair, make_rule
from deferral_train.decoding import Pair
from deferral_train.heads.rules import learned_rule
from deferral_train.rules import Rule


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drafter", required=True, help="folder or hub id of the small model")
    parser.add_argument("--verifier", required=True, help="folder or hub id of the large model")
    parser.add_argument("--head", help="exported head: folder or hub id")
    parser.add_argument("--alpha", type=float, help="operating point; default the one stored in the head")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-draft-tokens", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def prompts(lines: TextIO) -> Iterator[str]:
    """Prompts as they come in; empty lines are passed over."""
    yield from (line.strip() for line in lines if line.strip())


def answer(pair: Pair, prompt: str, rule: Rule, options: argparse.Namespace) -> None:
    """Stream one answer and say what it took."""
    result = pair.generate(
        prompt,
        rule=rule,
        token_streamer=TextStreamer(pair.tokenizer, skip_special_tokens=True),
        max_new_tokens=options.max_new_tokens,
        num_draft_tokens=options.num_draft_tokens,
        temperature=options.temperature,
    )
    stats = result.stats
    print(
        f"{int(stats.emitted.sum())} tokens, {stats.mean_acceptance_length:.2f} per verifier call, "
        f"{int(stats.kept.sum())} kept unchecked, {result.seconds:.2f} s",
        file=sys.stderr,
        flush=True,
    )


def serve(options: argparse.Namespace) -> None:
    rule = make_rule("lossless")
    if options.head is not None:
        rule = learned_rule(DeferralHead.from_pretrained(options.head), options.alpha)
    pair = load_pair(options.drafter, options.verifier, device=options.device)
    for prompt in prompts(sys.stdin):
        try:
            answer(pair, prompt, rule, options)
        except InputError as error:  # one bad prompt does not end the service
            print(f"error: {error}", file=sys.stderr, flush=True)


def main() -> int:
    try:
        serve(parse())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

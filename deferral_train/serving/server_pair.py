"""``decode --server URL``: a running server's rule against its lossless service, as a client sees both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from deferral_train.decoding.pair import BatchResult
from deferral_train.decoding.settings import Settings
from deferral_train.decoding.stopping import StopDrafting
from deferral_train.errors import InputError
from deferral_train.heads.rules import parse_spec
from deferral_train.pairs.encode import EncodedPrompt
from deferral_train.pairs.fingerprint import tokenizer_fingerprint
from deferral_train.pairs.load import load_tokenizer
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import Rule, make_rule
from deferral_train.rules.position import Lossless
from deferral_train.serving.client import ServerClient
from deferral_train.serving.engine_pair import handed_over, request_seeds
from deferral_train.serving.models import encode_within
from deferral_train.serving.served_stats import ServedBlocks, Steps, served_stats

SERVER, DIAL = "server", "dial"
STATISTICS = "--per-request-spec-decode-metrics detailed"  # flag of `vllm serve`


@dataclass(frozen=True)
class ServersRule(Lossless):
    """Stands for the rule that the server has in force, which the client does not know.

    Attributes:
        value: the dial that requests ask for; None for the server's own.
    """

    name: ClassVar[str] = SERVER
    value: float | None = None

    @property
    def is_lossless(self) -> bool:
        """False: nobody says so."""
        return False


def server_rules(specs: Sequence[str]) -> dict[str, Rule]:
    """Rules by label: ``lossless``, ``server`` and ``server:dial=X``; lossless alone, the default, means the first two.

    Raises:
        InputError: another one.
    """
    specs = ["lossless", SERVER] if list(specs) == ["lossless"] else specs
    found: dict[str, Rule] = {}
    for spec in specs:
        name, parameters = parse_spec(spec)
        dial = parameters.get(DIAL)
        known = (
            name == SERVER and set(parameters) <= {DIAL} and (dial is None or isinstance(dial, int | float))
        )
        if spec != "lossless" and (not known or isinstance(dial, bool)):
            raise InputError(
                f"rules: {spec!r} with --server: the rule is the server's; use lossless, server or server:dial=X"
            )
        asked = ServersRule(None if dial is None else float(dial))
        found[spec] = make_rule("lossless") if spec == "lossless" else asked
    return found


class ServerPair:
    """A server that decodes; a `deferral_train.decoding.decoder.Decoder`.

    Args:
        client: of the server.
        tokenizer: folder or hub id of the served verifier, of which the tokenizer alone is read.
    """

    def __init__(self, client: ServerClient, tokenizer: str) -> None:
        self.client = client
        self.tokenizer = load_tokenizer(tokenizer, "verifier")

    def check(self, rule: Rule, options: Settings) -> list[str]:
        """Nothing: the server has checked its head."""
        return []

    def encode(self, prompts: Sequence[Prompt], options: Settings) -> list[EncodedPrompt]:
        """Ids of every prompt; refuses the first that does not fit, and a server without the plug-in."""
        encoded = encode_within(
            self.tokenizer, prompts, options.chat, options.max_new_tokens, self.client.context
        )
        self.client.check_plug_in(encoded[0].input_ids)
        return encoded

    def group(
        self, encoded: Sequence[EncodedPrompt], options: Settings, sort: bool
    ) -> list[list[EncodedPrompt]]:
        """All prompts at once, of very many so many at once; ``batch_size`` of them are asked at the same time."""
        return handed_over(encoded, options)

    def turn(self, rule: Rule) -> str:
        """One for all."""
        return ""

    def decode_batch(
        self,
        batch: Sequence[EncodedPrompt],
        rule: Rule,
        options: Settings,
        stop: StopDrafting | None,
        number: int,
        token_log: Any = None,
    ) -> BatchResult:
        """Ask for every prompt, ``batch_size`` at the same time; see `Decoder`."""
        seeds = request_seeds(options, number, len(batch))
        bodies = [self._body(prompt, rule, options, seed) for prompt, seed in zip(batch, seeds)]
        began = time.perf_counter()
        with ThreadPoolExecutor(options.batch_size) as pool:
            answers = list(pool.map(self.client.complete, bodies))
        seconds = time.perf_counter() - began
        steps = [self._steps(answer) for answer in answers]
        ruled = rule.name == SERVER
        blocks = [_undecided(one) if ruled else ServedBlocks() for one in steps]
        stats = served_stats(steps, blocks, options.num_draft_tokens, 0)
        ran = {"engine": self._engine, "runner": "unknown", "device": SERVER, "dtype": "unknown"}
        return BatchResult(
            [one.tokens for one in steps], stats, seconds, ran | ({"deferrals": False} if ruled else {})
        )

    def _body(self, prompt: EncodedPrompt, rule: Rule, options: Settings, seed: int | None) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if not isinstance(rule, ServersRule):
            extra["deferral_lossless"] = 1
        elif rule.value is not None:
            extra["deferral_dial"] = rule.value
        if isinstance(rule, ServersRule) and options.max_request_loss is not None:
            extra["deferral_max_request_loss"] = options.max_request_loss
        found: dict[str, Any] = {
            "prompt": list(prompt.input_ids),
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "return_token_ids": True,
            "include_stop_str_in_output": True,
        }
        if seed is not None:
            found["seed"] = seed
        if options.stop_strings:
            found["stop"] = list(options.stop_strings)
        return found | ({"vllm_xargs": extra} if extra else {})

    def _steps(self, answer: Mapping[str, Any]) -> Steps:
        """The answer's tokens and blocks.

        Raises:
            InputError: it is not what a vLLM server says, or lacks the blocks.
        """
        try:
            choice = answer["choices"][0]
            tokens, finish = choice["token_ids"], choice["finish_reason"]
            said = (answer.get("metrics") or {}).get("speculative_decoding") or {}
            drafted, accepted = (said.get(f"per_step_{name}") or [] for name in ("drafted", "accepted"))
            numbers = (*tokens, *drafted, *accepted)
            if not all(isinstance(number, int) and number >= 0 for number in numbers):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise InputError(
                f"server={self.client.address} gives no token ids; decode needs a server of vLLM 0.32"
            ) from None
        if len(tokens) > 1 and not drafted:
            raise InputError(
                f"server={self.client.address} does not say what of each block was accepted; start it with {STATISTICS}"
            )
        return Steps(
            list(tokens), _deltas(len(tokens), accepted), str(finish or ""), list(drafted), list(accepted)
        )

    @property
    def _engine(self) -> str:
        return f"vllm {self.client.version}"

    def text(self, ids: Sequence[int]) -> str:
        """Emitted ids as text, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def facts(self, options: Settings) -> dict[str, Any]:
        """All that is known of the server; neither its number formats nor its weights are."""
        return {
            "engine": self._engine,
            "server": self.client.address,
            "model": self.client.model,
            "vocab_size": len(self.tokenizer),
            "temperature": options.temperature,
        }

    def record(self, options: Settings) -> dict[str, Any]:
        """Facts that decide outputs, as far as a client knows them."""
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        return {
            "pair": {"tokenizer": fingerprint},
            "models": {},
            "tokenizer": fingerprint,
            "conditions": self.facts(options),
        }

    def sizes(self) -> dict[str, Any]:
        """Empty: a client does not know them."""
        return {}


def _deltas(emitted: int, accepted: Sequence[int]) -> list[int]:
    """Tokens of each step, from the first, which has no drafts; what no block accounts for had no drafts either."""
    found, left = [], emitted
    for count in [1, *(accepted_tokens + 1 for accepted_tokens in accepted)]:
        if left > 0:
            found.append(min(count, left))
            left -= found[-1]
    return found + [1] * left


def _undecided(steps: Steps) -> ServedBlocks:
    """Blocks of which nobody says what the rule deferred."""
    nothing = [[False] * drafted for drafted in steps.drafted]
    return ServedBlocks(steps.accepted, nothing, nothing, [0.0] * len(steps.drafted))

"""``Pair``: prompts in, texts and statistics out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from deferral_train import provenance
from deferral_train.decoding.compatibility import check_consulted, check_head, heads_of, with_counting
from deferral_train.decoding.drafting.plan import DraftCascade
from deferral_train.decoding.facts import core_of
from deferral_train.decoding.generate import cascade_generate
from deferral_train.decoding.settings import Settings
from deferral_train.decoding.stats import GenerationStats
from deferral_train.decoding.stopping import StopDrafting
from deferral_train.errors import InputError
from deferral_train.heads.fingerprint import weights_key
from deferral_train.pairs.encode import EncodedPrompt, encode_prompts
from deferral_train.pairs.fingerprint import model_facts, tokenizer_fingerprint
from deferral_train.pairs.load import ModelPair, load_models, load_smaller
from deferral_train.pairs.positions import room_of
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import make_rule


@dataclass(frozen=True)
class BatchResult:
    """Prompts decoded in one call.

    Attributes:
        tokens: emitted ids of each row.
        stats: of the call. seconds: wall clock of it.
        ran: what decoded them, where that is not this package's loop.
    """

    tokens: list[list[int]]
    stats: GenerationStats
    seconds: float
    ran: dict[str, Any] | None = None


@dataclass(frozen=True)
class Generation:
    """The result of ``Pair.generate``, in the order of the prompts.

    Attributes:
        texts: decoded, special tokens left out.
        sequences: emitted ids of each prompt, end of sequence included.
        stats: counts, calls and token origins; row i belongs to prompt i.
        seconds: wall clock of all calls.
        mismatches: what was accepted although a head records otherwise.
    """

    texts: list[str]
    sequences: list[list[int]]
    stats: GenerationStats
    seconds: float
    mismatches: list[str] = field(default_factory=list)


class Pair:
    """A drafter and a verifier that decode together.

    Args:
        models: as loaded by :func:`deferral_train.pairs.load.load_models`.
        smaller: further drafters below the pair's own, largest first, for ``drafting``.
    """

    def __init__(self, models: ModelPair, smaller: Sequence[Any] = ()) -> None:
        self.models, self.smaller = models, tuple(smaller)
        self.tokenizer = models.tokenizer

    def generate(
        self,
        prompts: str | Sequence[str | Prompt],
        rule: Rule | str = "lossless",
        token_streamer: Any = None,
        **settings: Any,
    ) -> Generation:
        """Decode prompts under a rule.

        Args:
            prompts: one text or many.
            rule: a rule or its name.
            token_streamer: gets the tokens of a single prompt as they are emitted: transformers' ``TextStreamer``
                (without ``skip_prompt``: the prompt is not sent) or anything with ``put`` and ``end``.
            settings: fields of :class:`Settings`.

        Raises:
            InputError: a prompt that is empty or longer than the context, a setting that cannot work.
        """
        options = Settings(**_known(settings))
        rule = make_rule(rule) if isinstance(rule, str) else rule
        mismatches = self.check(rule, options)
        encoded = self.encode(as_prompts(prompts), options)
        counted, stop, counters = with_counting(rule, options.stop)
        results: list[BatchResult] = []
        for number, start in enumerate(range(0, len(encoded), options.batch_size)):
            batch = encoded[start : start + options.batch_size]
            results.append(
                self.decode_batch(batch, counted, options, stop, number, token_streamer=token_streamer)
            )
        tokens = [row for result in results for row in result.tokens]
        stats = GenerationStats.joined([result.stats for result in results])
        check_consulted(counters, int(stats.drafted.sum()))
        seconds = sum(result.seconds for result in results)
        return Generation([self.text(row) for row in tokens], tokens, stats, seconds, mismatches)

    def check(self, rule: Rule, options: Settings) -> list[str]:
        """Refuse heads that belong to another pair and plans for other drafters; returns the mismatches that were
        accepted.
        """
        facts = self.facts(options)
        self._drafter(options)
        found: list[str] = []
        for head in heads_of(rule, options.stop):
            found += check_head(head, self.models.fingerprints, facts, options.accept_mismatch)
        return found

    def facts(self, options: Settings) -> dict[str, Any]:
        """Conditions of a certificate besides the weights: engine, number formats, temperature, vocabulary."""
        drafter, verifier = self.models.drafter, self.models.verifier
        return {
            "engine": f"transformers {transformers.__version__}",
            "vocab_size": self.models.vocab_size,
            "dtype": {
                role: str(model.dtype).removeprefix("torch.")
                for role, model in (("drafter", drafter), ("verifier", verifier))
            },
            "quantization": _quantization(verifier),
            "temperature": options.temperature,
        }

    def record(self, options: Settings) -> dict[str, Any]:
        """Facts that decide outputs beside rules, prompts and settings; where models lie does not, their device does,
        since times are measured.
        """
        models = {"drafter": self.models.drafter, "verifier": self.models.verifier}
        models |= {f"smaller.{place}": model for place, model in enumerate(self.smaller)}
        return {
            "pair": self.models.fingerprints,
            "models": {role: _model_key(model) for role, model in models.items()},
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "conditions": self.facts(options) | {"device": self.models.device.type},
        }

    def sizes(self) -> dict[str, Any]:
        """Type and size of the models, by role."""
        return {role: model_facts(getattr(self.models, role)) for role in ("drafter", "verifier")}

    def group(
        self, encoded: Sequence[EncodedPrompt], options: Settings, sort: bool
    ) -> list[list[EncodedPrompt]]:
        """Batches of ``batch_size`` prompts, of like length with ``sort``."""
        order = sorted(encoded, key=lambda p: -len(p.input_ids)) if sort else list(encoded)
        size = options.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def turn(self, rule: Rule) -> str:
        """Rules of one turn are decoded side by side, batch by batch: here all of them."""
        return ""

    def encode(self, prompts: Sequence[Prompt], options: Settings) -> list[EncodedPrompt]:
        """Ids of every prompt; refuses the first that is empty or does not fit the context."""
        encoded = encode_prompts(
            self.tokenizer, prompts, is_encoder_decoder=self.models.is_encoder_decoder, chat=options.chat
        )
        if encoded.skipped:
            raise InputError(f"{encoded.skipped[0]}; remove it or give it a text")
        for prompt in encoded.kept:
            self._check_context(prompt, options.max_new_tokens)
        return encoded.kept

    def _check_context(self, prompt: EncodedPrompt, new: int) -> None:
        length, separate = len(prompt.input_ids), self.models.is_encoder_decoder
        for role in ("drafter", "verifier"):
            room = room_of((core_of(getattr(self.models, role)),))
            if separate and room.prompt is not None and length > room.prompt:
                raise InputError(
                    f"prompt {prompt.id}: {length} tokens exceed the {room.prompt} positions of the {role}'s encoder; "
                    "shorten it"
                )
            # The last token is emitted and never read.
            if room.text is not None and (0 if separate else length) + new - (not separate) > room.text:
                raise InputError(
                    f"prompt {prompt.id}: {length} tokens and room for {new} more exceed the {role}'s context of "
                    f"{room.text}; shorten it or lower max_new_tokens"
                )

    def decode_batch(
        self,
        batch: Sequence[EncodedPrompt],
        rule: Rule,
        options: Settings,
        stop: StopDrafting | None,
        number: int,
        token_log: Any = None,
        token_streamer: Any = None,
    ) -> BatchResult:
        """One call of ``verifier.generate``.

        Args:
            number: picks the batch's stream of random numbers.
            token_log, token_streamer: see ``cascade_generate``.
        """
        models = self.models
        inputs = pad_batch([prompt.input_ids for prompt in batch], self._pad_id(), models)
        generator = torch.Generator(device=models.device).manual_seed(options.seed * 1_000_003 + number)
        began = time.perf_counter()
        output = models.verifier.generate(
            **inputs,
            **self._generate_options(options),
            stopping_criteria=self._criteria(options),
            custom_generate=cascade_generate,
            drafter=self._drafter(options),
            rule=rule,
            num_draft_tokens=options.num_draft_tokens,
            stop=stop,
            execution=options.execution,
            bonus=options.bonus,
            verification=options.verification,
            blocks=options.blocks,
            max_request_loss=options.max_request_loss,
            generator=generator,
            token_log=token_log,
            token_streamer=token_streamer,
            vocab_size=models.vocab_size,
        )
        seconds = time.perf_counter() - began
        prompt_length = 1 if models.is_encoder_decoder else inputs["input_ids"].shape[1]
        counts = output.stats.emitted.tolist()
        rows = output.sequences[:, prompt_length:].tolist()
        return BatchResult([row[:count] for row, count in zip(rows, counts)], output.stats, seconds)

    def _drafter(self, options: Settings) -> Any:
        """The pair's drafter, or the cascade below it that the settings ask for."""
        if options.drafting is None:
            return self.models.drafter
        drafters = [self.models.drafter, *self.smaller] if options.drafting.drafters else []
        return DraftCascade(drafters, options.drafting, self.models.fingerprints.get("tokenizer"))

    def _generate_options(self, options: Settings) -> dict[str, Any]:
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": options.temperature,
                "top_k": options.top_k,
                "top_p": options.top_p,
            }
        return sampling | {
            "max_new_tokens": options.max_new_tokens,
            "num_beams": 1,
            "eos_token_id": list(self.models.eos_ids) or None,
            "pad_token_id": self._pad_id(),
            "return_dict_in_generate": True,
            # What the verifier's own configuration asks for is made here, or is no matter of the text.
            "stop_strings": None,
            "cache_implementation": None,
        }

    def _criteria(self, options: Settings) -> StoppingCriteriaList:
        inherited = self.models.verifier.generation_config.stop_strings or ()
        strings = options.stop_strings or ([inherited] if isinstance(inherited, str) else inherited)
        if not strings:
            return StoppingCriteriaList()
        return StoppingCriteriaList([StopStringCriteria(self.tokenizer, list(strings))])

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.models.eos_ids[0] if self.models.eos_ids else 0
        return int(pad)

    def text(self, ids: Sequence[int]) -> str:
        """Emitted ids as text, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def load_pair(
    drafter: str,
    verifier: str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    smaller: Sequence[str] = (),
    drafter_device: str | None = None,
    device_map: Any = None,
) -> Pair:
    """Load two checkpoints as a :class:`Pair`, and the drafters below; arguments and errors as for
    ``load_models``.
    """
    models = load_models(
        drafter,
        verifier,
        device,
        dtype,
        trust_remote_code,
        drafter_device=drafter_device,
        device_map=device_map,
    )
    return Pair(models, load_smaller(smaller, models, dtype, trust_remote_code))


def as_prompts(prompts: str | Sequence[str | Prompt]) -> list[Prompt]:
    """Texts as prompts with ids; prompts stay as they are."""
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise InputError("prompts is empty; give at least one")
    return [
        one if isinstance(one, Prompt) else Prompt(f"prompt:{number}", one)
        for number, one in enumerate(given, 1)
    ]


def pad_batch(rows: Sequence[Sequence[int]], pad: int, models: ModelPair) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``: padded left for decoder-only models, right for an encoder."""
    width = max(len(row) for row in rows)
    right = models.is_encoder_decoder
    ids = [
        [*row, *[pad] * (width - len(row))] if right else [*[pad] * (width - len(row)), *row] for row in rows
    ]
    ones = [[1] * len(row) for row in rows]
    mask = [[*one, *[0] * (width - len(one))] if right else [*[0] * (width - len(one)), *one] for one in ones]
    return {
        "input_ids": torch.tensor(ids, device=models.device),
        "attention_mask": torch.tensor(mask, device=models.device),
    }


def _model_key(model: Any) -> dict[str, Any]:
    """Weights of a model in memory, and what of its configuration changes texts."""
    generation = getattr(model, "generation_config", None)
    return {
        "weights": weights_key(model),
        "attention": getattr(model.config, "_attn_implementation", None),
        "generation": None if generation is None else provenance.hash_of(generation.to_diff_dict()),
    }


def _quantization(model: Any) -> str | None:
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        return None
    return str(found.get("quant_method") if isinstance(found, dict) else found.quant_method)


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(settings) - set(Settings.__dataclass_fields__))
    if unknown:
        known = ", ".join(Settings.__dataclass_fields__)
        raise InputError(f"generate has no setting {unknown[0]!r}; known: {known}")
    return settings

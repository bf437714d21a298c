"""The verifier alone in vLLM, writing on behind given tokens: what labels of finished texts are made with.

No drafter, no rule, prefix caching on. A batch of requests is as large as the caller makes it; the engine schedules it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from deferral_train.errors import InputError
from deferral_train.pairs.checkpoint import find_checkpoint
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.load import load_tokenizer
from deferral_train.pairs.prompts import Prompt
from deferral_train.serving.running import Engine, EngineSettings, Sampling, planned_runner

GPU_SHARE = 0.5  # of its memory, unless the settings say otherwise: both models run beside the engine


class WritingEngine:
    """The verifier in an engine of its own, started by the first text that is wanted; a context that ends it.

    Args:
        settings: a drafter and a rule in them are left out.
        sampled: texts are drawn by numbers of their own.

    Raises:
        InputError: a checkpoint or device that the engine does not serve.
        MissingExtraError: vLLM is not installed.
    """

    def __init__(self, settings: EngineSettings, sampled: bool = False) -> None:
        options = {"gpu_memory_utilization": GPU_SHARE, **settings.options}
        if sampled:
            from deferral_train.serving.numbered_draws import NumberedDraws

            options["logits_processors"] = [NumberedDraws]
        self.settings = replace(
            settings, drafter=None, deferral=None, prefix_caching=True, synchronous=sampled, options=options
        )
        self.models = self.settings.models()
        self._engine: Engine | None = None

    def __enter__(self) -> WritingEngine:
        return self

    def __exit__(self, *error: object) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Engine with its version, runner and number format: what decides its texts besides the weights."""
        models = self.models
        return {"engine": models.engine, "runner": planned_runner(self.settings), "dtype": models.dtype}

    @property
    def engine(self) -> Engine:
        """The running engine.

        Raises:
            InputError: it does not start.
        """
        if self._engine is None:
            self._engine = Engine(self.settings)
        return self._engine

    def write(
        self,
        beginnings: Sequence[Sequence[int]],
        most: Sequence[int],
        vocab_size: int,
        temperature: float = 0.0,
        numbers: Sequence[Sequence[float]] = (),
    ) -> list[list[int]]:
        """Have the verifier write behind each beginning, up to and with an end of sequence.

        Args:
            beginnings: token ids.
            most: tokens to write, at most, of each.
            vocab_size: ids from this one on are never written.
            temperature: 0 is greedy.
            numbers: above it, uniform numbers that each one's tokens are drawn with, in order.

        Raises:
            InputError: a text that does not fit, which vLLM would cut.
        """
        for beginning, count in zip(beginnings, most):
            if len(beginning) + count > self.engine.context:
                raise InputError(
                    f"a text of {len(beginning)} tokens and {count} more exceed the engine's context of "
                    f"{self.engine.context}; use shorter prompts or a smaller max_new_tokens"
                )
        padded = vocab_size < int(self.engine.config.model_config.get_vocab_size())
        # Labels speak of the model's own distribution, whatever its checkpoint would have `generate` do to it.
        each = [
            Sampling(count, allowed=vocab_size if padded else None, repetition_penalty=1.0) for count in most
        ]
        if temperature > 0:
            from deferral_train.serving.numbered_draws import NUMBERS

            brought = [
                {"temperature": temperature, "each": list(own), "prompt": len(beginning)}
                for own, beginning in zip(numbers, beginnings)
            ]
            each = [replace(one, extra={NUMBERS: own}) for one, own in zip(each, brought)]
        return self.engine.write(beginnings, each)


def context_of(
    verifier: str, prompts: Sequence[Prompt], chat: str, max_prompt_tokens: int | None, max_new_tokens: int
) -> int:
    """Tokens of the longest prompt, as the verifier's tokenizer makes them, and its answer.

    Args:
        verifier: checkpoint folder or hub id.
        chat, max_prompt_tokens, max_new_tokens: as ``collect`` takes them.

    Raises:
        InputError: no prompt can be used.
    """
    tokenizer = load_tokenizer(find_checkpoint(verifier, "verifier"), "verifier")
    kept = encode_prompts(tokenizer, prompts, chat=chat, max_prompt_tokens=max_prompt_tokens).kept
    if not kept:
        raise InputError(
            f"prompts: none of {len(prompts)} can be used; give texts, or a larger max_prompt_tokens"
        )
    return max(len(prompt.input_ids) for prompt in kept) + max_new_tokens

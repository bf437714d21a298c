"""``cascade_generate``: speculative cascades as a ``custom_generate`` callable of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from deferral_train.decoding import checks
from deferral_train.decoding.cascade_drafting import CascadeProposer
from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.encoding import encode
from deferral_train.decoding.executions import execute
from deferral_train.decoding.facts import facts_of
from deferral_train.decoding.given_drafting import GivenProposer
from deferral_train.decoding.laws import SamplingLaws
from deferral_train.decoding.loop import Cascade
from deferral_train.decoding.proposing import ModelProposer, Proposer
from deferral_train.decoding.static_stepper import Room, Work, stepper_for
from deferral_train.decoding.stats import GenerationStats, Ledger
from deferral_train.decoding.stopping import StopDrafting
from deferral_train.decoding.tokens import TokenRows
from deferral_train.drafting.counts import ReviewCounts
from deferral_train.drafting.given import GivenDraft
from deferral_train.drafting.plan import DraftCascade
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import make_rule


@dataclass
class CascadeOutput(ModelOutput):
    """What ``cascade_generate`` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: [R, L] ids, prompt included, padded on the right.
        stats: counts, calls and the origin of every emitted token.
        reviews: who let through how much of whom, where the drafter is a cascade.
        passes: [R, n] passes of each of its n drafters that a row took part in because it needed them.
    """

    sequences: Tensor | None = None
    stats: GenerationStats | None = None
    reviews: ReviewCounts | None = None
    passes: Tensor | None = None


@torch.no_grad()
def cascade_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    drafter: Any = None,
    rule: Rule | str = "lossless",
    num_draft_tokens: int = 5,
    drafter_inputs: dict[str, Tensor] | None = None,
    inputs_tensor: Tensor | None = None,
    stop: StopDrafting | None = None,
    execution: str = "speculative",
    bonus: str = "verifier",
    max_request_loss: float | None = None,
    generator: torch.Generator | None = None,
    token_streamer: Any = None,
    token_log: Any = None,
    vocab_size: int | None = None,
    rows_at_once: int | None = None,
    compile: str = "auto",
    **model_kwargs: Any,
) -> Tensor | CascadeOutput:
    """Decode with a drafter and a verifier under a deferral rule; use as::

        verifier.generate(**inputs, custom_generate=cascade_generate, drafter=drafter, rule=make_rule("opt",
        alpha=0.2))

    transformers prepares everything (processors, criteria, encoder states) and hands it over.

    Args:
        model: the verifier.
        input_ids: [R, P] prompts, or decoder start tokens of an encoder-decoder model.
        logits_processor, stopping_criteria, generation_config: as prepared by ``generate``. Decisions read
            the laws after every processor except temperature and truncation warpers; criteria are checked
            per emitted token.
        drafter: a model over the same tokens; a :class:`~deferral_train.drafting.DraftCascade`, whose plan then
            says how many tokens are drafted; or a :class:`~deferral_train.drafting.GivenDraft`.
        rule: a rule or its name.
        num_draft_tokens: most tokens drafted per block, at least 1.
        drafter_inputs: encoder inputs (``input_ids``, ``attention_mask``) of an encoder-decoder drafter, one
            row per prompt; default the verifier's own.
        inputs_tensor: the encoder's ids, handed over by ``generate``.
        stop: adaptive draft length, see :mod:`deferral_train.decoding.stopping`.
        execution: ``speculative``, ``token`` (Algorithm 2), ``lazy`` or ``sequence``.
        bonus: the law of the token after a block that was emitted whole: ``verifier`` (p, free) or ``exact``
            (the rule's target law, one more drafter pass).
        max_request_loss: bound B on the summed estimated loss of kept tokens per row; beyond it a row is
            lossless.
        generator: source of randomness; default torch's.
        token_streamer: gets the tokens of a single row as they are emitted (``put``, ``end``).
        token_log: collects what both models thought of every token, see
            :mod:`deferral_train.decoding.token_log`.
        vocab_size: ids that both models know, where one or both pad their vocabulary beyond it.
        rows_at_once: most rows that run at a time, default all; others take the places of those that end (prompts of
            half as many more are fed ahead of that).
        compile: passes of fixed shape, see :mod:`deferral_train.decoding.compiled`. ``auto``: CUDA graphs on CUDA
            where the model allows it, else ``off``; ``static``: CUDA graphs, or on a CPU the shapes alone;
            ``inductor``, ``aot_eager``, ``eager``: through that backend of ``torch.compile``; ``off``.

    Returns:
        sequences [R, L], or :class:`CascadeOutput` where the configuration asks for a dictionary.

    Raises:
        InputError: anything that cannot work (see :mod:`deferral_train.decoding.checks`), before any work.
    """
    rule = make_rule(rule) if isinstance(rule, str) else rule
    plan = drafter.plan if isinstance(drafter, DraftCascade) else None
    given = drafter if isinstance(drafter, GivenDraft) else None
    drafters, depth = [drafter], num_draft_tokens
    if plan is not None:
        drafters, num_draft_tokens, depth = list(drafter.drafters), plan.longest[0], plan.depth
    if given is not None:
        drafters, num_draft_tokens, depth = [], given.longest, given.longest
    request = checks.Request(
        model, drafters, plan, input_ids, generation_config, rule, num_draft_tokens, execution, bonus,
        max_request_loss, stop, token_streamer, token_log, vocab_size,
        rows_at_once, compile, model_kwargs,
    )  # fmt: skip
    checks.check_request(request)
    if isinstance(drafter, DraftCascade):
        checks.check_cascade(request, drafter)
    if given is not None:
        checks.check_given(request, given)
    ends = EndOfRow(stopping_criteria or [], generation_config.max_length)
    tokens = TokenRows(
        input_ids, _prompt_mask(model, model_kwargs), ends.max_length, depth,
        _pad_id(generation_config),
        rows_at_once,
    )  # fmt: skip
    laws = SamplingLaws(logits_processor or [], bool(generation_config.do_sample))
    ledger = Ledger(len(input_ids), num_draft_tokens)
    with contextlib.ExitStack() as stack:
        models = [*drafters, model]
        hidden = _hidden_read(models, rule, stop)
        encoders = _encoders(models, model_kwargs, inputs_tensor, drafter_inputs, len(input_ids))
        margin = depth + 2 if execution == "speculative" else None
        size = vocab_size or facts_of(model).vocab_size
        capacity = min(tokens.ids.shape[1], tokens.prompt_length + 256)
        room, recurring = Room(capacity, margin, size), _recurring(request, depth)
        steppers, ways = [], []
        for one, encoder, read, passes in zip(models, encoders, hidden, recurring):
            stepper, way = stepper_for(stack, Work(one, encoder, read, passes), tokens, room, compile)
            steppers.append(stepper)
            ways.append(way)
        proposer: Proposer
        if given is not None:
            proposer = GivenProposer(given, tokens, size)
        elif plan is None:
            proposer = ModelProposer(steppers[0], tokens, laws, ends, stop, generator)
        else:
            prompts = _prompts(model, tokens, inputs_tensor, model_kwargs)
            separate = bool(model.config.is_encoder_decoder)
            proposer = CascadeProposer(
                plan, steppers[:-1], size, tokens, laws, ends, prompts, separate, generator
            )
        cascade = Cascade(
            steppers[0], steppers[-1], rule, laws, tokens, ends, ledger, num_draft_tokens, proposer,
            bonus, generator, max_request_loss, token_streamer=token_streamer, token_log=token_log,
        )  # fmt: skip
        if stop is not None:
            stop.start(len(input_ids), num_draft_tokens)
        execute(execution, cascade)
    if token_streamer is not None:
        token_streamer.end()
    stats = ledger.finish(cascade.verifier.passes, sum(one.passes for one in proposer.steppers))
    stats.ways.update(
        zip([*(f"drafter {n}" if n else "drafter" for n in range(len(drafters))), "verifier"], ways)
    )
    sequences = tokens.sequences()
    if not generation_config.return_dict_in_generate:
        return sequences
    if not isinstance(proposer, CascadeProposer):
        return CascadeOutput(sequences, stats)
    return CascadeOutput(sequences, stats, proposer.counts, torch.tensor(proposer.passes))


def _pad_id(generation_config: Any) -> int:
    pad = getattr(generation_config, "_pad_token_tensor", None)
    if pad is None:
        return 0
    return int(pad.flatten()[0])


def _prompt_mask(model: Any, model_kwargs: dict[str, Any]) -> Tensor | None:
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    return model_kwargs.get(name)


def _hidden_read(models: Sequence[Any], rule: Rule, stop: StopDrafting | None) -> list[bool]:
    """Whether anybody reads a model's hidden states, drafters first and the verifier last."""
    asked = rule.needs | (stop.needs if stop is not None else frozenset())
    read = [bool(asked & {"drafter_hidden"})] * (len(models) - 1)
    read.append(bool(asked & {"verifier_hidden", "verifier_hidden_at_token"}))
    return read


def _recurring(request: checks.Request, depth: int) -> list[tuple[tuple[int, int], ...]]:
    """Per model the passes that recur, as (columns, logits); none where their widths change from pass to pass."""
    if request.plan is not None or not request.drafters:
        return [()] * (len(request.drafters) + 1)
    alone = request.rule.name == "drafter_only" and request.max_request_loss is None
    verifies = request.execution == "speculative" and not alone
    block = depth + 1 if request.rule.drafts else 1
    # Behind a block that was emitted whole, the drafter has not seen its last token.
    return [((1, 1), (2, 1)), ((block, block),) if verifies else ()]


def _prompts(
    model: Any, tokens: TokenRows, inputs_tensor: Tensor | None, model_kwargs: dict[str, Any]
) -> list[list[int]]:
    """The ids that Max-Gram may copy from, per row, without padding."""
    if not model.config.is_encoder_decoder:
        prompts = tokens.ids[:, : tokens.prompt_length].tolist()
        return [row[pad:] for row, pad in zip(prompts, tokens.pads)]
    ids = checks.encoder_ids(inputs_tensor)
    repeats = len(tokens.ids) // len(ids)
    rows = ids.repeat_interleave(repeats, dim=0).tolist()
    mask = _padding_or_none(model_kwargs.get("attention_mask"))
    if mask is None:
        return rows
    return [
        [token for token, present in zip(row, flags) if present] for row, flags in zip(rows, mask.tolist())
    ]


def _encoders(
    models: Sequence[Any],
    model_kwargs: dict[str, Any],
    inputs_tensor: Tensor | None,
    drafter_inputs: dict[str, Tensor] | None,
    rows: int,
) -> list[tuple[Tensor, Tensor | None] | None]:
    """Encoder states and masks of drafters and verifier, one row per decoded row; None for decoder-only
    models.
    """
    if not models[-1].config.is_encoder_decoder:
        return [None] * len(models)
    mask = _padding_or_none(model_kwargs.get("attention_mask"))
    states = model_kwargs["encoder_outputs"][0]
    if len(models) == 1:
        return [(states, mask)]
    if drafter_inputs is None:
        ids = checks.encoder_ids(inputs_tensor)
        drafter_mask = None if mask is None else mask[:: rows // len(ids)]
    else:
        ids = drafter_inputs["input_ids"]
        drafter_mask = _padding_or_none(drafter_inputs.get("attention_mask"))
    encoded = [encode(one, ids, drafter_mask) for one in models[:-1]]
    repeats = rows // len(ids)
    if drafter_mask is not None:
        drafter_mask = drafter_mask.repeat_interleave(repeats, dim=0)
    drafters = [(one.repeat_interleave(repeats, dim=0), drafter_mask) for one in encoded]
    return [*drafters, (states, mask)]


def _padding_or_none(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask

"""``cascade_generate``: speculative cascades as a ``custom_generate`` callable of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from deferral_train.decoding.block import VerifiedBlock, on_host
from deferral_train.decoding.cached_model import CachedModel, CacheRoom
from deferral_train.decoding.cascade_drafting import CascadeProposer, GivenProposer
from deferral_train.decoding.checks import Request, check_request, rows_together
from deferral_train.decoding.criteria import EndOfRow
from deferral_train.decoding.distributions import SamplingDistributions
from deferral_train.decoding.drafting.counts import ReviewCounts
from deferral_train.decoding.executions import lazy_cascade, sequence_cascade, token_cascade
from deferral_train.decoding.facts import core_of
from deferral_train.decoding.handed import HandedSignature
from deferral_train.decoding.hidden import HiddenTap, tap_hidden
from deferral_train.decoding.inputs import decoder_inputs, encoder_inputs, prompts_of
from deferral_train.decoding.proposing import Draft, ModelProposer, Proposer
from deferral_train.decoding.settings import Settings
from deferral_train.decoding.state import DecodingState
from deferral_train.decoding.stats import GenerationStats, StatsRecorder
from deferral_train.decoding.stepwise import StepwiseModel
from deferral_train.decoding.stopping import StopDrafting
from deferral_train.decoding.tokens import TokenRows
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import make_rule
from deferral_train.rules.verify import raise_fault, verify_block


@dataclass
class CascadeOutput(ModelOutput):
    """The result of ``cascade_generate`` with ``return_dict_in_generate=True``.

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
    num_draft_tokens: int = Settings.num_draft_tokens,
    drafter_inputs: dict[str, Tensor] | None = None,
    inputs_tensor: Tensor | None = None,
    stop: StopDrafting | None = None,
    execution: str = Settings.execution,
    bonus: str = Settings.bonus,
    verification: str = Settings.verification,
    blocks: str = Settings.blocks,
    max_request_loss: float | None = None,
    generator: torch.Generator | None = None,
    token_streamer: Any = None,
    token_log: Any = None,
    vocab_size: int | None = None,
    **model_kwargs: Any,
) -> Tensor | CascadeOutput:
    """Decode with a drafter and a verifier under a deferral rule; use as::

        verifier.generate(**inputs, custom_generate=cascade_generate, drafter=drafter, rule=make_rule("opt",
        alpha=0.2))

    transformers prepares everything (processors, criteria, encoder states) and hands it over.

    Args:
        model: the verifier.
        input_ids: [R, P] prompts, or decoder start tokens of an encoder-decoder model.
        logits_processor, stopping_criteria, generation_config: as prepared by ``generate``. Decisions read the
            distributions after every processor except temperature and truncation warpers; criteria are checked per
            emitted token. Those of the caller's own see text that a row has, at one length in all rows, as in
            ``generate``: in a batch all rows then advance together.
        drafter: a model over the same tokens; a :class:`~deferral_train.decoding.drafting.DraftCascade`, whose plan
            then says how many tokens are drafted; or a :class:`~deferral_train.decoding.drafting.GivenDraft`.
        rule: a rule or its name.
        num_draft_tokens: most tokens drafted per block, at least 1.
        drafter_inputs: encoder inputs (``input_ids``, ``attention_mask``) of an encoder-decoder drafter, one
            row per prompt; default the verifier's own.
        inputs_tensor: the encoder's ids, handed over by ``generate``.
        stop: adaptive draft length, see :mod:`deferral_train.decoding.stopping`.
        execution: ``speculative``, ``token`` (Algorithm 2), ``lazy`` or ``sequence``.
        bonus: the distribution of the token after a block that was emitted whole: ``verifier`` (p, free) or ``exact``
            (the rule's target, one more drafter pass).
        verification: ``token`` checks drafted tokens one by one, ``block`` together (Sun et al. 2024): longer drafts
            stand. The output distribution stays the same under a lossless rule and with bonus ``exact``; with bonus
            ``verifier`` a lossy rule's bonus tokens fall at other places.
        blocks: ``tight`` from the first token on and never beyond the limit, or ``served`` as serving engines lay them:
            the verifier gives the first token, and the last block runs over the limit and is cut. Under a lossy rule
            bonus tokens fall at other places.
        max_request_loss: bound B on the summed estimated loss of kept tokens per row; beyond it a row is
            lossless.
        generator: source of randomness, on the CPU or on a device; default torch's.
        token_streamer: gets the tokens of a single row as they are emitted (``put``, ``end``); default the
            ``streamer`` that ``generate`` was given.
        token_log: collects what both models thought of every token, see
            :mod:`deferral_train.decoding.token_log`.
        vocab_size: ids that both models know, where one or both pad their vocabulary beyond it.

    Returns:
        sequences [R, L], or :class:`CascadeOutput` where the configuration asks for a dictionary.

    Raises:
        InputError: anything that cannot work (see :mod:`deferral_train.decoding.checks`), before any work.
    """
    # The stopping criterion of its strings is made already; an assistant beside a drafter is refused.
    model_kwargs.pop("tokenizer", None)
    request = Request(
        model=model,
        drafter=drafter,
        input_ids=input_ids,
        generation_config=generation_config,
        rule=make_rule(rule) if isinstance(rule, str) else rule,
        settings=Settings(
            num_draft_tokens=num_draft_tokens, execution=execution, bonus=bonus, verification=verification,
            blocks=blocks, max_request_loss=max_request_loss, stop=stop,
        ),
        token_streamer=token_streamer,
        token_log=token_log,
        vocab_size=vocab_size,
        model_kwargs=model_kwargs,
        inputs_tensor=inputs_tensor,
        drafter_inputs=drafter_inputs,
        generator=generator,
        criteria=stopping_criteria or [],
    )  # fmt: skip
    check_request(request)
    with contextlib.ExitStack() as taps:
        state = _start(request, logits_processor or [], taps)
        EXECUTIONS[state.execution](state)
    return _output(request, state)


def speculative(state: DecodingState) -> None:
    """Until all rows end: draft a block, verify it in one pass, emit what the rule's target distribution lets through.

    Batched speculative execution (Narasimhan et al. 2025, Algorithms 4 to 6) with acceptance per row.
    """
    rule, settings, distributions, tokens = state.rule, state.settings, state.distributions, state.tokens
    while state.running:
        draft = state.proposer.propose(state.limits, state.exact)
        logits = state.verifier.feed(ahead=draft.depth, keep=draft.depth + 1).to(tokens.device)
        decision = distributions.decision(logits, tokens, 0, draft.drafted)
        sampling = distributions.sampling(logits, decision, tokens, 0, draft.drafted)
        # Without a draft nothing can be kept, so that there is nothing to charge. What stands behind an end is never
        # emitted, and must not be charged.
        limit = settings.max_request_loss if draft.columns else None
        verdict = verify_block(
            rule,
            draft.tokens,
            draft.logits,
            decision,
            temperature=distributions.temperature,
            drafter_sampling_logits=draft.sampling,
            verifier_sampling_logits=sampling,
            lengths=draft.lengths if limit is None else state.ends.lengths(draft.tokens, draft.lengths),
            bonus=settings.bonus if rule.drafts else "verifier",
            generator=state.generator,
            context=state.context(draft),
            max_request_loss=limit,
            spent=state.spent if limit is not None else None,
            verification=settings.verification,
            check=False,
        )
        block = on_host(verdict, draft, state.ends)
        raise_fault(rule, block.faults)
        if state.token_log is not None:
            state.token_log.block(state, draft, decision, block)
        _emit(state, block, draft)


def _emit(state: DecodingState, block: VerifiedBlock, draft: Draft) -> None:
    """Append what stands and the correction or bonus; cut at ends and limits; let finished rows leave."""
    tokens = state.tokens
    tokens.put_last(block.emitted)
    counts, done = state.ends.cut(tokens, block.emitted, [len(new) for new in block.emitted], state.together)
    calls = draft.calls
    if calls is None:
        calls = [proposed + 1 for proposed in block.proposed] if state.exact else block.proposed
    state.stats.block(tokens.rows, counts, calls, block)
    state.proposer.observe(block.proposed, block.accepted)
    state.advance(counts, done, block.spent)


EXECUTIONS: dict[str, Callable[[DecodingState], None]] = {
    "speculative": speculative,
    "token": token_cascade,
    "lazy": lazy_cascade,
    "sequence": sequence_cascade,
}


def _start(request: Request, processors: Sequence[Any], taps: contextlib.ExitStack) -> DecodingState:
    """The state of a checked request before its first token; ``taps`` holds the hooks that read hidden states."""
    config, settings, rows = request.generation_config, request.settings, len(request.input_ids)
    ends = EndOfRow(request.criteria, request.max_length)
    size = request.vocab_size or request.facts.vocab_size
    distributions = SamplingDistributions(processors, bool(config.do_sample), size)
    together = rows_together(request, distributions.strict or ends.strict, ends.joint)
    tokens = TokenRows(
        request.input_ids, _prompt_mask(request), ends.max_length, request.depth, _pad_id(config)
    )
    hidden = [taps.enter_context(tap_hidden(core_of(one), read)) for one, read in _hidden_read(request)]
    models = _cached(request, tokens, hidden, together)
    proposer: Proposer
    if request.given is not None:
        proposer = GivenProposer(request.given, tokens, size)
    elif request.plan is None:
        proposer = ModelProposer(models[0], tokens, distributions, ends, settings.stop, request.generator)
    else:
        prompts = prompts_of(request.model, tokens, request.inputs_tensor, request.model_kwargs)
        separate = request.facts.is_encoder_decoder
        proposer = CascadeProposer(
            request.plan, models[:-1], tokens, distributions, ends, prompts, separate, request.generator
        )
    if settings.stop is not None:
        settings.stop.start(rows, request.num_draft_tokens)
    return DecodingState(
        models[0], models[-1], request.rule, distributions, tokens, ends, StatsRecorder(rows, request.num_draft_tokens),
        proposer, settings, request.num_draft_tokens, request.generator, together, request.token_streamer,
        request.token_log,
    )  # fmt: skip


def _output(request: Request, state: DecodingState) -> Tensor | CascadeOutput:
    """Sequences and counts of a finished state, in the form that the configuration asks for."""
    if request.token_streamer is not None:
        request.token_streamer.end()
    proposer = state.proposer
    stats = state.stats.finish(state.verifier.passes, sum(one.passes for one in proposer.models))
    sequences = state.tokens.sequences()
    if not request.generation_config.return_dict_in_generate:
        return sequences
    if not isinstance(proposer, CascadeProposer):
        return CascadeOutput(sequences, stats)
    return CascadeOutput(sequences, stats, proposer.counts, torch.tensor(proposer.passes))


def _cached(
    request: Request, tokens: TokenRows, taps: list[HiddenTap | None], together: bool
) -> list[CachedModel]:
    """The models with their inputs and caches, drafters first and the verifier last."""
    asked, rows = request.model_kwargs, len(request.input_ids)
    if request.facts.is_encoder_decoder:
        inputs = encoder_inputs(request.models, asked, request.inputs_tensor, request.drafter_inputs, rows)
    else:
        mask = _prompt_mask(request)
        inputs = [decoder_inputs(one, tokens, mask, asked, one is request.model) for one in request.models]
    margin = request.depth + 2 if request.settings.execution == "speculative" else None
    capacity = min(tokens.ids.shape[1], tokens.prompt_length + 256)
    room = CacheRoom(capacity, margin, trims=not together)
    facts = [*request.drafter_facts, request.facts]
    return [
        (StepwiseModel if one.stepwise else CachedModel)(model, tokens, room, given, tap)
        for one, model, given, tap in zip(facts, request.models, inputs, taps)
    ]


def _pad_id(generation_config: Any) -> int:
    pad = getattr(generation_config, "_pad_token_tensor", None)
    return 0 if pad is None else int(pad.flatten()[0])


def _prompt_mask(request: Request) -> Tensor | None:
    name = "decoder_attention_mask" if request.facts.is_encoder_decoder else "attention_mask"
    return request.model_kwargs.get(name)


def _hidden_read(request: Request) -> list[tuple[Any, bool]]:
    """Every model, drafters first and the verifier last, and whether anybody reads its hidden states."""
    stop = request.settings.stop
    asked = request.rule.needs | (stop.needs if stop is not None else frozenset())
    found = [(one, "drafter_hidden" in asked) for one in request.drafters]
    return [*found, (request.model, bool(asked & {"verifier_hidden", "verifier_hidden_at_token"}))]


cascade_generate.__signature__ = HandedSignature.of(cascade_generate)  # type: ignore[attr-defined]

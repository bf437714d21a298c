"""Everything that cannot work is refused here, before any work, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode

from deferral_train.decoding.criteria import longest_row
from deferral_train.decoding.drafting.given import GivenDraft
from deferral_train.decoding.drafting.plan import DraftCascade, Plan
from deferral_train.decoding.facts import ModelFacts, facts_of
from deferral_train.decoding.settings import Settings
from deferral_train.decoding.stopping import check_stop
from deferral_train.errors import InputError
from deferral_train.rules.base import BlockRule, PositionRule, Rule, named
from deferral_train.rules.summary import FIELDS
from deferral_train.rules.verify import check_together

EXECUTION_NAMES = ("speculative", "token", "lazy", "sequence")
BONUSES = ("verifier", "exact")
BLOCKS = ("tight", "served")
KNOWN_ARGUMENTS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "encoder_outputs"}
    | {"cache_params", "decoder_attention_mask", "token_type_ids", "mm_token_type_ids"}
)
UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Request:
    """The arguments of one call of ``cascade_generate``, and what follows from them at once.

    Attributes:
        facts: of the verifier.
        drafters: the models that draft, largest first; none for a given text or Max-Gram alone.
        num_draft_tokens: most tokens of a block.
        depth: most drafted tokens behind the end of a row at any time.
        max_length: columns that a row may fill.
    """

    model: Any
    drafter: Any
    input_ids: Tensor
    generation_config: Any
    rule: Rule
    settings: Settings
    token_streamer: Any
    token_log: Any
    vocab_size: int | None
    model_kwargs: dict[str, Any]
    inputs_tensor: Tensor | None = None
    drafter_inputs: dict[str, Tensor] | None = None
    generator: torch.Generator | None = None
    criteria: Sequence[Any] = ()

    @cached_property
    def facts(self) -> ModelFacts:
        return facts_of(self.model)

    @cached_property
    def drafter_facts(self) -> list[ModelFacts]:
        """Facts of each drafter."""
        return [facts_of(one) for one in self.drafters]

    @property
    def plan(self) -> Plan | None:
        """Of a cascade of drafters."""
        return self.drafter.plan if isinstance(self.drafter, DraftCascade) else None

    @property
    def given(self) -> GivenDraft | None:
        """A text that is the draft."""
        return self.drafter if isinstance(self.drafter, GivenDraft) else None

    @property
    def drafters(self) -> list[Any]:
        if isinstance(self.drafter, DraftCascade):
            return list(self.drafter.drafters)
        return [] if self.given is not None else [self.drafter]

    @property
    def models(self) -> list[Any]:
        """Drafters first, the verifier last."""
        return [*self.drafters, self.model]

    @cached_property
    def max_length(self) -> int:
        return longest_row(self.criteria, self.generation_config.max_length, self.input_ids.shape[1])

    @property
    def num_draft_tokens(self) -> int:
        if self.plan is not None:
            return self.plan.longest[0]
        return self.settings.num_draft_tokens if self.given is None else self.given.longest

    @property
    def depth(self) -> int:
        return self.num_draft_tokens if self.plan is None else self.plan.depth


def check_request(request: Request) -> None:
    """Refuse what cannot work.

    Raises:
        InputError: naming the argument, its value and the remedy.
    """
    _check_settings(request)
    _check_execution(request)
    _check_models(request)
    _check_configuration(request)
    _check_lengths(request)
    _check_cache(request)
    if isinstance(request.drafter, DraftCascade):
        _check_cascade(request, request.drafter)
    if request.given is not None:
        _check_given(request, request.given)


def rows_together(request: Request, strict: bool, joint: bool) -> bool:
    """True where the rows of a batch have to advance by the same number of tokens, as in ``generate``.

    So that a processor or criterion of the caller's own sees the text that it would see there, and for models whose
    rows cannot sit at offsets of their own.

    Args:
        strict: a processor or criterion may be shown nothing but text that rows have.
        joint: rows end together.

    Raises:
        InputError: what rows that advance together cannot do.
    """
    rows = len(request.input_ids)
    if rows == 1:
        return False
    facts = [*request.drafter_facts, request.facts]
    stepwise = [f"{one.name} is read one token at a time ({one.stepwise})" for one in facts if one.stepwise]
    fixed = [
        f"{one.name} has absolute positions that cannot be given per row"
        for one in facts
        if not one.aligns_right
    ]
    own = ["a logits processor or stopping criterion of your own must see whole rows"] if strict else []
    ends = ["without eos_token_id a stopping criterion ends all rows at once"] if joint else []
    if not (reasons := [*stepwise, *fixed, *own, *ends]):
        return False
    reason = reasons[0]
    if request.plan is not None and request.drafters:
        raise InputError(
            f"batch of {rows} with a cascade of drafters: {reason}; decode one row at a time, or use one drafter"
        )
    if request.settings.max_request_loss is not None and request.settings.execution == "speculative":
        raise InputError(f"batch of {rows} with max_request_loss: {reason}; decode one row at a time")
    return True


def _check_settings(request: Request) -> None:
    if not isinstance(request.rule, Rule):
        raise InputError(f"rule is {type(request.rule).__name__}; give a Rule or the name of one")
    settings = request.settings
    if settings.bonus not in BONUSES:
        raise InputError(f"bonus is {settings.bonus!r}; use one of {', '.join(BONUSES)}")
    if "verifier_hidden_at_token" in request.rule.needs and (
        settings.bonus == "exact" or settings.execution != "speculative"
    ):
        raise InputError(
            f"rule {request.rule.name} reads verifier_hidden_at_token, which only a drafted token has once the "
            f"verifier has read it, and bonus is {settings.bonus!r}, execution {settings.execution!r}; use bonus "
            "'verifier' and execution 'speculative'"
        )
    _check_blocks(request)
    _check_verification(request)
    limit = settings.max_request_loss
    if limit is not None and not limit >= 0:
        raise InputError(f"max_request_loss is {limit}; give a bound >= 0")
    if settings.stop is not None:
        check_stop(settings.stop)
    if request.token_streamer is not None and len(request.input_ids) != 1:
        raise InputError(f"streamer: streams a single row, not {len(request.input_ids)}; leave it out")


def _check_blocks(request: Request) -> None:
    """Refuse blocks that are laid as serving engines do where none of one drafter's are drafted."""
    settings = request.settings
    if settings.blocks not in BLOCKS:
        raise InputError(f"blocks is {settings.blocks!r}; use one of {', '.join(BLOCKS)}")
    if settings.blocks != "tight" and (
        settings.execution != "speculative"
        or settings.bonus == "exact"
        or request.plan is not None
        or request.given is not None
    ):
        raise InputError(
            f"blocks={settings.blocks!r} are one drafter's, with execution='speculative' and bonus='verifier'; "
            "leave the other out, or use 'tight'"
        )


def _check_verification(request: Request) -> None:
    """Refuse what the rule cannot do with this way of verifying, and blocks that are too short for it."""
    rule, settings = request.rule, request.settings
    with named(rule):
        check_together(rule, settings.verification, settings.bonus, settings.max_request_loss)
    if settings.execution != "speculative":
        if settings.verification != "token":
            raise InputError(
                f"verification={settings.verification!r} checks drafted blocks: it needs execution='speculative', not "
                f"{settings.execution!r}"
            )
    elif isinstance(rule, BlockRule) and not rule.is_lossless and request.num_draft_tokens <= rule.reach:
        raise InputError(
            f"rule {rule.name} waits for {rule.reach} drafted tokens behind one, and blocks have "
            f"{request.num_draft_tokens}: nothing would ever be forgiven; give it a smaller window, or draft more"
        )


def _check_execution(request: Request) -> None:
    rule, execution = request.rule, request.settings.execution
    if execution not in EXECUTION_NAMES:
        raise InputError(f"execution is {execution!r}; use one of {', '.join(EXECUTION_NAMES)}")
    if execution == "speculative":
        return
    if not isinstance(rule, PositionRule):
        raise InputError(
            f"execution={execution!r} needs a rule that decides per position; {rule.name} does not"
        )
    if execution in ("lazy", "sequence") and rule.stage != "draft" and rule.name != "drafter_only":
        raise InputError(
            f"execution={execution!r} decides before the verifier has run; rule {rule.name} is of stage "
            f"{rule.stage!r}; use a rule of stage 'draft' (chow, chow_log, a draft-stage head)"
        )
    if request.settings.max_request_loss is not None:
        _check_limit(rule, execution)
    if request.settings.stop is not None:
        raise InputError(f"stop shortens drafted blocks: it needs execution='speculative', not {execution!r}")
    if request.token_log is not None:
        raise InputError(f"token_log needs execution='speculative', not {execution!r}")
    if request.token_streamer is not None and execution == "sequence":
        raise InputError("streamer: execution='sequence' may take back a whole text; leave it out")


def _check_given(request: Request, given: GivenDraft) -> None:
    """Refuse what a given text cannot do.

    Raises:
        InputError: naming the argument, its value and the remedy.
    """
    _check_alone(request)
    rule = request.rule
    if "drafter_hidden" in rule.needs or (rule.reads_drafter_confidence and not rule.is_lossless):
        raise InputError(
            f"rule {rule.name} reads the drafter's confidence, which a given text has none of; use biased, "
            "opt_verifier, token_v3 or lossless"
        )
    if request.settings.bonus == "exact":
        raise InputError(
            "bonus 'exact' needs a drafter's distribution after the block; a given text has none"
        )
    given.check(len(request.input_ids), request.vocab_size or request.facts.vocab_size)


def _check_alone(request: Request) -> None:
    if request.settings.execution != "speculative":
        raise InputError(
            f"execution={request.settings.execution!r} needs one model as the drafter; use 'speculative'"
        )
    if request.settings.stop is not None:
        raise InputError("stop shortens one drafter's blocks; with a cascade lower the entries of k instead")


def _check_cascade(request: Request, cascade: DraftCascade) -> None:
    """Refuse what a cascade of drafters cannot do.

    Raises:
        InputError: naming the argument, its value and the remedy.
    """
    plan, rule = cascade.plan, request.rule
    _check_alone(request)
    if plan.one_hot_tail and rule.reads_drafter_confidence and not rule.is_lossless:
        raise InputError(
            f"rule {rule.name} reads the drafter's confidence, and k[0] gives the verifier tokens of Max-Gram, which "
            "has none; let a drafter review them (last entry of k[0] 0), or use opt_verifier, token_v3 or lossless"
        )
    if request.settings.bonus == "exact" and not cascade.drafters:
        raise InputError("bonus 'exact' needs a drafter's distribution after the block; Max-Gram has none")
    if "drafter_hidden" in rule.needs and (plan.one_hot_tail or len(plan.reviewing) != 1):
        raise InputError(
            f"rule {rule.name} reads the drafter's hidden states, and k[0] has {len(plan.reviewing)} drafters and "
            f"{plan.k[0][-1]} tokens of Max-Gram; give it the tokens of one drafter"
        )
    bigrams = plan.max_gram.bigrams if plan.max_gram is not None else None
    if bigrams is not None:
        bigrams.check(cascade.tokenizer, request.vocab_size or request.facts.vocab_size)


def _check_limit(rule: Rule, execution: str) -> None:
    if execution == "sequence":
        raise InputError(
            "max_request_loss: execution='sequence' keeps or leaves a whole row; use another execution"
        )
    if execution == "lazy" and not estimates_early(rule):
        raise InputError(
            f"max_request_loss: execution='lazy' knows the drafter alone, and rule {rule.name} estimates its loss "
            "from the verifier; use a draft-stage head, or execution='speculative' or 'token'"
        )


def estimates_early(rule: Rule) -> bool:
    """True where the rule's estimated loss of keeping reads nothing of the verifier."""
    return all(FIELDS[name].sees in ("drafter", "context") for name in rule.gap_needs)


def _check_models(request: Request) -> None:
    if None in request.drafters:
        raise InputError("drafter is missing; pass drafter=... to generate")
    for facts in request.drafter_facts:
        _check_drafter(request, facts)
    if lasting := [one.name for one in (*request.drafter_facts, request.facts) if one.irrevocable]:
        raise InputError(
            f"{lasting[0]} keeps its state in its own modules: what it has read cannot be taken back; use another model"
        )


def _check_drafter(request: Request, facts: ModelFacts) -> None:
    vocab_size, own = request.vocab_size, request.facts
    if facts.is_encoder_decoder != own.is_encoder_decoder:
        raise InputError(
            "drafter and verifier: one is encoder-decoder and the other is not; use two of a kind"
        )
    sizes = [facts.vocab_size, own.vocab_size]
    if vocab_size is not None and not 0 < vocab_size <= min(sizes):
        raise InputError(f"vocab_size is {vocab_size}; the models have {sizes[0]} and {sizes[1]} columns")
    if vocab_size is None and sizes[0] != sizes[1]:
        raise InputError(
            f"vocabularies differ: drafter {sizes[0]}, verifier {sizes[1]}; use a pair with one tokenizer, "
            "and pass vocab_size=len(tokenizer) where one model only pads its vocabulary (load_pair does)"
        )


def _check_configuration(request: Request) -> None:
    config = request.generation_config
    if (config.num_beams or 1) > 1:
        raise InputError(f"num_beams is {config.num_beams}; speculative decoding samples or is greedy, use 1")
    mode = config.get_generation_mode(request.model_kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"generation mode is {mode.value}; cascade_generate is greedy or samples, and drafter= is what drafts"
        )
    if config.use_cache is False:
        raise InputError("use_cache is False; speculative decoding needs the cache")
    if config.prefill_chunk_size is not None and request.facts.is_encoder_decoder:
        raise InputError(
            f"prefill_chunk_size is {config.prefill_chunk_size}: in chunks generate itself drops the mask of the "
            "encoder's padding; leave it out"
        )
    asked = [name for name in UNSUPPORTED_OUTPUTS if getattr(config, name, None)]
    if asked:
        raise InputError(f"{asked[0]} is not offered by cascade_generate; leave it out")
    unknown = sorted(
        name
        for name, value in request.model_kwargs.items()
        if name not in KNOWN_ARGUMENTS and value is not None and value != {}
    )
    if unknown:
        raise InputError(f"{unknown[0]}: cascade_generate cannot hand this to two models; leave it out")


def _check_lengths(request: Request) -> None:
    prompt, given = request.input_ids.shape[1], request.generation_config.max_length
    if prompt < 1:
        raise InputError("input_ids: the prompt is empty; give at least one token")
    longest = request.max_length
    if longest <= prompt:
        raise InputError(f"max_length is {given}, the prompt has {prompt} tokens; raise max_new_tokens")
    mask = request.model_kwargs.get("attention_mask")
    padded = mask is not None and not bool(mask.all())
    roles = [("drafter", one) for one in request.drafter_facts]
    for role, facts in (*roles, ("verifier", request.facts)):
        _check_encoder_room(request, role, facts)
        context, switch = facts.context, facts.long_rope
        # The last token is emitted and never read.
        if context is not None and longest - 1 > context:
            raise InputError(
                f"prompt of {prompt} tokens and room for {longest - prompt} more exceed the {role}'s context "
                f"of {context}; shorten the prompt or lower max_new_tokens"
            )
        if switch is not None and longest > switch and (padded or len(request.input_ids) > 1):
            raise InputError(
                f"prompt of {prompt} tokens and room for {longest - prompt} more reach beyond the {switch} at which "
                f"the {role}'s longrope changes its factors for a whole batch; decode one unpadded row at a time"
            )


def _check_encoder_room(request: Request, role: str, facts: ModelFacts) -> None:
    given = request.inputs_tensor
    if role == "drafter" and request.drafter_inputs is not None:
        given = request.drafter_inputs["input_ids"]
    most = facts.room.prompt
    if most is None or given is None or given.dim() != 2 or given.shape[1] <= most:
        return
    raise InputError(
        f"prompt of {given.shape[1]} tokens exceeds the {most} positions of the {role}'s encoder; shorten it"
    )


def _check_cache(request: Request) -> None:
    cache = request.model_kwargs.get("past_key_values")
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if own is None:
        return
    if type(own) is not DynamicCache:
        raise InputError(
            f"cache {type(own).__name__} cannot be rolled back row by row; leave cache_implementation unset"
        )
    if own.get_seq_length() > 0:
        raise InputError(
            "past_key_values: starting from a filled cache is not offered; pass the whole prompt"
        )

"""Everything that cannot work is refused here, before any work, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from deferral_train.decoding.facts import facts_of
from deferral_train.decoding.static_support import check_compile
from deferral_train.decoding.stopping import check_stop
from deferral_train.drafting.given import GivenDraft
from deferral_train.drafting.plan import DraftCascade, Plan
from deferral_train.errors import InputError
from deferral_train.rules.base import PositionRule, Rule
from deferral_train.rules.summary import FIELDS

EXECUTION_NAMES = ("speculative", "token", "lazy", "sequence")
BONUSES = ("verifier", "exact")
KNOWN_ARGUMENTS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "encoder_outputs"}
    | {"decoder_attention_mask"}
)
UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Request:
    """The arguments of one call, as far as they are checked."""

    model: Any
    drafters: Sequence[Any]
    plan: Plan | None
    input_ids: Tensor
    generation_config: Any
    rule: Rule
    num_draft_tokens: int
    execution: str
    bonus: str
    max_request_loss: float | None
    stop: Any
    token_streamer: Any
    token_log: Any
    vocab_size: int | None
    rows_at_once: int | None
    compile: str
    model_kwargs: dict[str, Any]


def check_request(request: Request) -> None:
    """Refuse what cannot work.

    Raises:
        InputError: naming the argument, its value and the remedy.
    """
    _check_settings(request)
    _check_execution(request)
    for drafter in request.drafters:
        _check_models(request.model, drafter, request.vocab_size)
    _check_configuration(request)
    _check_lengths(request)
    _check_cache(request.model_kwargs)
    check_compile(request.compile, [*request.drafters, request.model])


def _check_settings(request: Request) -> None:
    if not isinstance(request.rule, Rule):
        raise InputError(f"rule is {type(request.rule).__name__}; give a Rule or the name of one")
    count = request.num_draft_tokens
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"num_draft_tokens is {count!r}; draft at least 1 token")
    rows = request.rows_at_once
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise InputError(f"rows_at_once is {rows!r}; give a number of rows, or leave it out to run all")
    if request.bonus not in BONUSES:
        raise InputError(f"bonus is {request.bonus!r}; use one of {', '.join(BONUSES)}")
    if "verifier_hidden_at_token" in request.rule.needs and (
        request.bonus == "exact" or request.execution != "speculative"
    ):
        raise InputError(
            f"rule {request.rule.name} reads verifier_hidden_at_token, which only a drafted token has once the "
            f"verifier has read it, and bonus is {request.bonus!r}, execution {request.execution!r}; use bonus "
            "'verifier' and execution 'speculative'"
        )
    limit = request.max_request_loss
    if limit is not None and not limit >= 0:
        raise InputError(f"max_request_loss is {limit}; give a bound >= 0")
    if request.stop is not None:
        check_stop(request.stop)
    if request.token_streamer is not None and len(request.input_ids) != 1:
        raise InputError(f"token_streamer: streams a single row, not {len(request.input_ids)}; leave it out")


def _check_execution(request: Request) -> None:
    rule, execution = request.rule, request.execution
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
    if request.max_request_loss is not None:
        _check_limit(rule, execution)
    if request.stop is not None:
        raise InputError(f"stop shortens drafted blocks: it needs execution='speculative', not {execution!r}")
    if request.token_log is not None:
        raise InputError(f"token_log needs execution='speculative', not {execution!r}")
    if request.token_streamer is not None and execution == "sequence":
        raise InputError("token_streamer: execution='sequence' may take back a whole text; leave it out")


def check_given(request: Request, given: GivenDraft) -> None:
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
    if request.bonus == "exact":
        raise InputError("bonus 'exact' needs a drafter's law after the block; a given text has none")
    given.check(len(request.input_ids), request.vocab_size or facts_of(request.model).vocab_size)


def _check_alone(request: Request) -> None:
    if request.execution != "speculative":
        raise InputError(f"execution={request.execution!r} needs one model as the drafter; use 'speculative'")
    if request.stop is not None:
        raise InputError("stop shortens one drafter's blocks; with a cascade lower the entries of k instead")


def check_cascade(request: Request, cascade: DraftCascade) -> None:
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
    if request.bonus == "exact" and not cascade.drafters:
        raise InputError("bonus 'exact' needs a drafter's law after the block; Max-Gram has none")
    if "drafter_hidden" in rule.needs and (plan.one_hot_tail or len(plan.reviewing) != 1):
        raise InputError(
            f"rule {rule.name} reads the drafter's hidden states, and k[0] has {len(plan.reviewing)} drafters and "
            f"{plan.k[0][-1]} tokens of Max-Gram; give it the tokens of one drafter"
        )
    bigrams = plan.max_gram.bigrams if plan.max_gram is not None else None
    if bigrams is not None:
        bigrams.check(cascade.tokenizer, request.vocab_size or facts_of(request.model).vocab_size)


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
    """Whether the rule's estimated loss of keeping reads nothing of the verifier."""
    return all(FIELDS[name].sees in ("drafter", "context") for name in rule.gap_needs)


def _check_models(model: Any, drafter: Any, vocab_size: int | None) -> None:
    if drafter is None:
        raise InputError("drafter is missing; pass drafter=... to generate")
    if drafter.config.is_encoder_decoder != model.config.is_encoder_decoder:
        raise InputError(
            "drafter and verifier: one is encoder-decoder and the other is not; use two of a kind"
        )
    sizes = [facts_of(one).vocab_size for one in (drafter, model)]
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
    if config.use_cache is False:
        raise InputError("use_cache is False; speculative decoding needs the cache")
    asked = [name for name in UNSUPPORTED_OUTPUTS if getattr(config, name, None)]
    if asked:
        raise InputError(f"{asked[0]} is not offered by cascade_generate; leave it out")
    unknown = sorted(
        name
        for name, value in request.model_kwargs.items()
        if name not in KNOWN_ARGUMENTS and value is not None
    )
    if unknown:
        raise InputError(f"{unknown[0]}: cascade_generate cannot hand this to two models; leave it out")
    if len(request.input_ids) > 1 and not _aligns_right(request):
        raise InputError(
            f"batch of {len(request.input_ids)}: {type(request.model).__name__} has absolute positions that "
            "cannot be given per row; decode one row at a time"
        )


def _aligns_right(request: Request) -> bool:
    """Whether every row may sit at its own offset: positions per row, or relative ones only."""
    models = (request.model, *request.drafters)
    if not request.model.config.is_encoder_decoder:
        return all(facts_of(one).takes_positions for one in models)
    return all(facts_of(one).relative_positions for one in models)


def _check_lengths(request: Request) -> None:
    prompt, longest = request.input_ids.shape[1], request.generation_config.max_length
    if prompt < 1:
        raise InputError("input_ids: the prompt is empty; give at least one token")
    if longest <= prompt:
        raise InputError(f"max_length is {longest}, the prompt has {prompt} tokens; raise max_new_tokens")
    roles = [("drafter", one) for one in request.drafters]
    for role, one in (*roles, ("verifier", request.model)):
        context = facts_of(one).context
        if context is not None and longest > context:
            raise InputError(
                f"prompt of {prompt} tokens and room for {longest - prompt} more exceed the {role}'s context "
                f"of {context}; shorten the prompt or lower max_new_tokens"
            )


def _check_cache(model_kwargs: dict[str, Any]) -> None:
    cache = model_kwargs.get("past_key_values")
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


def encoder_ids(inputs_tensor: Tensor | None) -> Tensor:
    """The encoder's ids for the drafter, or a refusal."""
    if inputs_tensor is None or inputs_tensor.dim() != 2:
        raise InputError(
            "drafter_inputs is missing: the drafter's encoder needs input_ids; pass drafter_inputs="
        )
    return inputs_tensor

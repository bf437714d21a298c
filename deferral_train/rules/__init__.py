"""Rules: when to keep the drafter, what distribution that emits, how a block is verified. Torch only."""

from deferral_train.rules.base import BlockRule, Dial, LawRule, PositionRule, Rule, TokenRule
from deferral_train.rules.learned import Judge, LearnedRule
from deferral_train.rules.registry import RULES, make_rule
from deferral_train.rules.summary import FIELDS, Field, Summary, summarize
from deferral_train.rules.token_gap import TokenGapRule
from deferral_train.rules.verify import Origin, Verdict, verify_block

__all__ = [
    "FIELDS",
    "RULES",
    "BlockRule",
    "Dial",
    "Field",
    "Judge",
    "LawRule",
    "LearnedRule",
    "Origin",
    "PositionRule",
    "Rule",
    "Summary",
    "TokenGapRule",
    "TokenRule",
    "Verdict",
    "make_rule",
    "summarize",
    "verify_block",
]

"""The heads that an artifact may name. A config never names code to import; it names an entry of this
table.
"""

from __future__ import annotations

from deferral_train.heads.base import DeferralHead
from deferral_train.heads.cost_sensitive import CostSensitiveHead
from deferral_train.heads.gap import GapHead
from deferral_train.heads.judge import JudgeHead
from deferral_train.heads.plug_in import PlugInHead
from deferral_train.heads.truth import TokenHead, TruthMixtureHead

HEADS: dict[str, type[DeferralHead]] = {
    head.head_type: head
    for head in (GapHead, CostSensitiveHead, TruthMixtureHead, TokenHead, JudgeHead, PlugInHead)
}

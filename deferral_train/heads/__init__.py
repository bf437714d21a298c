"""Heads: learned estimators of the loss gap, and the folder they are exported to.

Every module with a head class of the package is imported here: that is how an artifact finds it in :data:`HEADS`.
"""

from deferral_train.heads.base import HEADS, DeferralHead
from deferral_train.heads.cost_sensitive import CostSensitiveHead
from deferral_train.heads.export import push_to_hub, set_operating_point
from deferral_train.heads.gap import GapHead
from deferral_train.heads.judge import JudgeHead
from deferral_train.heads.plug_in import PlugInHead
from deferral_train.heads.token_gap import TokenGapHead
from deferral_train.heads.truth import TokenHead, TruthMixtureHead

__all__ = [
    "HEADS",
    "CostSensitiveHead",
    "DeferralHead",
    "GapHead",
    "JudgeHead",
    "PlugInHead",
    "TokenGapHead",
    "TokenHead",
    "TruthMixtureHead",
    "push_to_hub",
    "set_operating_point",
]

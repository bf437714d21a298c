"""Evidence: offline scores, matched comparisons, certificates, offline against online."""

from deferral_train.evaluation.offline import score_rules
from deferral_train.evaluation.table import ScoreTable

__all__ = ["ScoreTable", "score_rules"]

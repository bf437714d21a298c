"""Proposers of tokens besides one model: Max-Gram, cascades of drafters, their distributions and their speed.

Knows tokens and laws, nothing of models: ``decoding`` runs what is described here.
"""

from deferral_train.drafting.bigrams import BigramTable
from deferral_train.drafting.given import GivenDraft
from deferral_train.drafting.max_gram import MaxGram
from deferral_train.drafting.plan import DraftCascade, Plan

__all__ = ["BigramTable", "DraftCascade", "GivenDraft", "MaxGram", "Plan"]

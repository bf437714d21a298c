"""Proposers of tokens besides one model: Max-Gram, cascades of drafters, their distributions and their speed.

Knows tokens and distributions, nothing of models: ``decoding`` runs what is described here.
"""

from deferral_train.decoding.drafting.bigrams import BigramTable
from deferral_train.decoding.drafting.given import GivenDraft
from deferral_train.decoding.drafting.max_gram import MaxGram
from deferral_train.decoding.drafting.plan import DraftCascade, Plan

__all__ = ["BigramTable", "DraftCascade", "GivenDraft", "MaxGram", "Plan"]

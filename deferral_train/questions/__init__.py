"""Questions in English about a real database, with the queries that answer them; and untrusted queries, run safely."""

from deferral_train.questions.database import build_database
from deferral_train.questions.generate import Questions, make_questions

__all__ = ["Questions", "build_database", "make_questions"]

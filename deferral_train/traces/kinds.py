"""Kinds of prefixes and labels that a manifest names. Imports nothing, so that settings can be read without Arrow."""

PREFIX_SOURCES = ("reference", "drafter", "verifier")  # or "cascade:<rule>"
JUDGE_LABELS = ("selfjudge", "autojudge")
SEQUENCE_LABELS = "sequence"

"""The mark of numbers that must not be believed: who shows one number needs no statistics for it."""

MARK = "(!)"
"""Stands behind every number of an evaluation with a failed check."""

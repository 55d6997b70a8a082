"""Checks C1 to C21 of an evaluation: what they look at, their rules, and when a number must not be believed."""

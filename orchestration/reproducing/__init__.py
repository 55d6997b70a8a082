"""Reproducing the papers' tables and figures: plan, training, evaluation, readings, outcome."""

"""Attacking, analysing and comparing trained models, distributed and resumable."""

"""Attacks on finished models, each against a model whose draws the protocol provides."""

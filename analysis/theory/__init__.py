"""Quantities that the papers argue with, computed on trained models."""

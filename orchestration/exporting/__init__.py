"""Naming trained models and exporting them."""

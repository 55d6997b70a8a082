"""Exporting trained models and registering them."""

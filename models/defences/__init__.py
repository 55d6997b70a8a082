"""One file per defence: its config and its builder, collected in `DEFENCE_MODELS`. Found by scanning; see `models.registry`."""

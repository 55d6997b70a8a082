"""One file per family of objectives, collected in `OBJECTIVES`. Found by scanning; see `trainers.objective`."""

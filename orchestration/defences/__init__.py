"""One file per defence: its paper, its search space, what to watch. Found by scanning; see `orchestration.catalogue`."""

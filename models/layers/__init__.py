"""Random layers, and what a layer tells an evaluation of itself: its folding, its cost, its normalized groups."""

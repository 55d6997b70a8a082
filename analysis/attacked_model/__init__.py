"""A model as an attack sees it: its draws, its gradients over them, what of it is folded and what is put back afterwards."""

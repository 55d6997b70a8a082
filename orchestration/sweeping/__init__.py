"""Sweeps: what they are, their search, their end, looking at them, and running them as Ray jobs."""

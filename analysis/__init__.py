"""What a finished model is worth: attacks, protocols, statistics, verdicts, tables. Knows nothing of the cluster."""

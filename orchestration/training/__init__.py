"""Training one experiment: in this process, in a Tune trial, or in a Ray Train group; its run folder and its resources."""

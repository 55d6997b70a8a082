"""Where and how often: experiments, command line, Ray Train and Tune, Optuna, MLflow, export."""

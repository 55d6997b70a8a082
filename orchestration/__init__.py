"""Where and how often: experiments, command line, Ray Train and Tune, Optuna, MLflow, export."""

import os

import models as models  # first of all: it sets what PyTorch reads when it is loaded

# What Ray reads when it is imported, or later: set here, before any module of this package can import it.
# A driver started by `uv run` would otherwise ship and rebuild the environment for every worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
# An objective may be known only at the end of a trial, or after epochs that validate.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")

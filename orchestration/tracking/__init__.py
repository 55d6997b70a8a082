"""MLflow: one writer, explicit runs, the model registry."""

"""How networks are trained: data, inner attacks, objectives, the fit loop, resumable state. PyTorch, no Ray, no MLflow."""

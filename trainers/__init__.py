"""How networks are trained: data, inner attacks, objectives, the fit loop, resumable state. PyTorch, no Ray, no MLflow."""

import models as models  # first of all: it sets what PyTorch reads when it is loaded

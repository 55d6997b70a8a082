"""A model of Rayndom as MLflow runs it: MLflow keeps this file beside the weights and executes it to load the model ("models from code").

A trace, MLflow's default for PyTorch, would freeze the randomness. Here each call takes a new draw. Needs nothing of Rayndom but `models`,
of which a copy lies beside the weights for places where Rayndom is not installed.
"""

from __future__ import annotations

import importlib
import secrets
import sys
import threading
from collections.abc import Iterator
from typing import Any

import mlflow
import numpy as np
import torch


class RandomizedClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc,name-defined]  # MLflow types it as a plain attribute
    """Answers images (B, C, H, W), float32 in [0,1], with logits (B, K)."""

    _skip_type_hint_validation = True
    """MLflow would ask for annotations, and has none that say an array of images; the signature in MLmodel is checked all the same."""

    def load_context(self, context: Any) -> None:
        """Load the model in eval mode, on the GPU where there is one. Its draws are those of no known seed."""
        _find_library(context.artifacts["code"])
        from models.accelerator import device_for
        from models.randomness import is_randomized
        from models.weights import load_pretrained

        self.device = device_for("whatever there is")
        model = load_pretrained(context.artifacts["model"], resample_on_forward=False, seed=secrets.randbits(62))
        self.model, self.randomized = model.to(self.device), is_randomized(model)
        self.alone = threading.Lock()
        """A draw is a state of the model: a server's threads take turns."""

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # see above
        """Return logits. A randomized model answers with one draw, a new one at each call.

        Args:
            context: of MLflow, not used.
            model_input: an array of images.
            params: `draws`: the logarithms of the mean probabilities of so many draws are returned, which is the averaged predictor.
                `seed`: the draws are those of `models.randomness.seeded`, the same at each call; -1: they are new ones.
        """
        asked = params or {}
        draws, seed = int(asked.get("draws", 1)), int(asked.get("seed", -1))
        if draws < 1 or seed < -1:
            raise ValueError(f"draws is at least 1 and seed not negative (or -1: new draws); they are {draws} and {seed}")
        x_BCHW = torch.as_tensor(np.asarray(model_input, dtype=np.float32))
        if not bool(((x_BCHW >= 0) & (x_BCHW <= 1)).all()):
            raise ValueError("pixels are in [0,1]")
        with self.alone, torch.no_grad():
            answers = list(self._answers(x_BCHW.to(self.device), draws if self.randomized else 1, None if seed < 0 else seed))
        if len(answers) == 1:
            return answers[0].cpu().numpy()
        return torch.stack([logits_BK.double().softmax(1) for logits_BK in answers]).mean(0).log().float().cpu().numpy()

    def _answers(self, x_BCHW: torch.Tensor, draws: int, seed: int | None) -> Iterator[torch.Tensor]:
        from models.randomness import resample, seeded

        if seed is None:
            for _ in range(draws):
                resample(self.model)
                yield self.model(x_BCHW)
            return
        with seeded(self.model, seed):
            for number in range(draws):
                if number:
                    resample(self.model)
                yield self.model(x_BCHW)


def _find_library(copy: str) -> None:
    """Make `models` importable: what is installed is taken, for it reads what earlier versions wrote; else the copy beside the weights."""
    try:
        importlib.import_module("models.weights")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("models"):
            raise
        if "models" in sys.modules:
            where = getattr(sys.modules["models"], "__file__", None)
            raise ImportError(f"another module is called `models` here ({where}); start Python in another folder") from None
        sys.path.append(copy)
        importlib.invalidate_caches()
        importlib.import_module("models.weights")


mlflow.models.set_model(RandomizedClassifier())

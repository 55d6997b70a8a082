"""An exported model in MLflow's format: what `mlflow.pyfunc.load_model`, `mlflow.pytorch.load_model` and `mlflow models serve` read.

The folder holds the exported model as it is, the code that loads it, its signature, an example of its input, and the versions of the
packages that it needs. Nothing is traced or pickled.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

import models
from models.torch_loading import write_stub
from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, read_config

MODEL_FOLDER = "artifacts/model"
"""Where in a folder of MLflow's format the exported model lies."""
EXPORTED_FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)

REQUIRED = ("mlflow", "torch", "torchvision", "timm", "numpy", "pydantic", "PyYAML", "safetensors")
"""Packages that `models` needs, and MLflow itself."""
# What it says while a model is saved is nothing that a user could act on.
logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
_LOADER = Path(__file__).with_name("served_model.py")


@contextmanager
def in_mlflow_format(exported: Path, model_id: str | None = None) -> Iterator[Path]:
    """Return a temporary folder that holds an exported model in MLflow's format; `model_id` of the logged model that it becomes.

    Raises:
        UserError: `exported` holds no exported model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "model")
        source.mkdir()
        for name in EXPORTED_FILES:
            shutil.copyfile(exported / name, source / name)
        write_stub(source)
        folder = Path(scratch, "logged")
        _save(source, folder, model_id)
        yield folder


def _save(source: Path, folder: Path, model_id: str | None) -> None:
    description = Model(model_id=model_id)
    # The same files by MLflow's flavour of PyTorch: it calls `torch.load`, which gets the model by `models.torch_loading`.
    description.add_flavor("pytorch", model_data=MODEL_FOLDER, pytorch_version=str(torch.__version__), code=None)
    shape = tuple(read_config(source)["model"]["image_shape"])
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch, "code")
        _copy_code(Path(models.__file__).parent, code / "models")
        loader = Path(scratch, _LOADER.name)
        shutil.copyfile(_LOADER, loader)  # MLflow keeps the mode of what it copies, and an installation has modes of its own
        mlflow.pyfunc.save_model(
            folder,
            mlflow_model=description,
            python_model=str(loader),
            artifacts={"model": str(source), "code": str(code)},
            signature=signature_of(source),
            input_example=np.round(np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(1, *shape), 3),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIRED],
        )
    _forget_places(folder)


def _copy_code(package: Path, to: Path) -> None:
    """Copy the source files of a package, with modes that follow the umask and not those of an installation."""
    for path in package.rglob("*.py"):
        copy = to / path.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _forget_places(folder: Path) -> None:
    """Leave in the description no folder of this machine: MLflow writes where each file came from, and reads it nowhere."""
    description = Model.load(folder)
    flavour = description.flavors["python_function"]
    flavour["model_code_path"] = _LOADER.name
    for artifact in flavour["artifacts"].values():
        artifact["uri"] = artifact["path"]
    description.save(folder / "MLmodel")


def signature_of(exported: Path) -> ModelSignature:
    """Return what a model takes and answers: images (B, C, H, W), logits (B, K), and the parameters of a call."""
    spec = read_config(exported)["model"]
    images = TensorSpec(np.dtype(np.float32), (-1, *spec["image_shape"]))
    logits = TensorSpec(np.dtype(np.float32), (-1, spec["num_classes"]))
    params = ParamSchema([ParamSpec("draws", "long", 1), ParamSpec("seed", "long", -1)])
    return ModelSignature(Schema([images]), Schema([logits]), params)

"""Who asks for an accelerator asks for any maker's, except where something of one maker is meant."""

from __future__ import annotations

import re

import pytest
import torch

from models.accelerator import CPU, accelerator, device_for, wait_for
from models.errors import UserError
from orchestration.experiment import ResourcesConfig
from orchestration.training.preparation import _device_for
from tests.architecture.source import ROOT, python_files

ONE_MAKERS = {
    "models/accelerator.py",  # which makers' modules are alike
    "models/backbones/__init__.py",  # initial weights drawn on a CUDA device
    "models/layers/deformable_convolution.py",  # torchvision has a kernel for it
    "models/layers/random_normalization.py",  # capture of CUDA graphs
    "trainers/compilation.py",  # where compiled code is the default
    "trainers/optimizer.py",  # fused kernels
    "trainers/hardware.py",  # what is known of bf16, maker by maker
    "trainers/step_profile.py",  # PyTorch's names of activities, peaks by product
    "trainers/data/streaming.py",  # pinned memory
    "analysis/attacked_model/state_guard.py",  # generators, maker by maker
    "orchestration/doctor/machine.py",  # NVIDIA's driver
    "orchestration/environment.py",  # what is told of NVIDIA's products
    "orchestration/commands/analyse.py",  # words of the command line
}
PACKAGES = ("models", "trainers", "analysis", "orchestration", "rayndom")
ASKS_FOR_ONE = re.compile(r"torch\.cuda\.|[\"']cuda[\"']|\.is_cuda\b")


def test_a_maker_is_named_only_where_it_is_meant():
    found = {file.relative_to(ROOT).as_posix() for file in python_files(*PACKAGES) if ASKS_FOR_ONE.search(file.read_text())}
    assert found == ONE_MAKERS


@pytest.mark.parametrize(("kind", "index"), [("cuda", 1), ("xpu", 2), ("mps", 0)])
def test_a_training_goes_to_the_accelerator_that_pytorch_found(kind, index, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: index)
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    there = torch.device(kind, index)
    assert accelerator() == there == device_for(1) == _device_for(ResourcesConfig(gpus_per_worker=0.5))
    assert device_for(0) == CPU == _device_for(ResourcesConfig())
    wait_for(there)
    wait_for(CPU)
    assert waited == [there]


def test_without_one_the_cpu_is_used_only_where_nobody_insists(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert accelerator() is None and device_for(1) == CPU
    with pytest.raises(UserError, match="gpus_per_worker 0"):
        _device_for(ResourcesConfig(gpus_per_worker=1))

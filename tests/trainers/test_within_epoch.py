"""States amid an epoch: which one is taken, and what a kill amid the writing leaves. That they are exact is tested with every defence."""

from __future__ import annotations

import pytest
import torch

from models.registry import build_model
from models.threat_model import ThreatModel
from rayndom.testing.defence import Interruption, Killed
from trainers.config import TrainingConfig
from trainers.data import DataConfig, load_data
from trainers.fit import fit
from trainers.within_epoch import FOLDER, forget_within_epoch, read_within_epoch, write_within_epoch


def state(mark: int) -> dict:
    return {
        "seed": mark,
        "weights": {},
        "optimizer": {},
        "generators": {},
        "randomness": {},
        "totals": {},
        "objective": {},
        "clipped_steps": torch.zeros(()),
        "seconds": 1.0,
    }


def found(folder, epoch, rank=0, size=1):
    read = read_within_epoch(folder, epoch, rank, size)
    return read and (read[0], read[1]["seed"])


def test_the_last_step_that_every_worker_has_is_taken(tmp_path):
    assert found(tmp_path, 0) is None
    for step, ranks in ((1, (0, 1)), (2, (0, 1)), (3, (1, 0)), (4, (1,))):
        for rank in ranks:
            write_within_epoch(state(10 * step + rank), tmp_path, 2, step, rank, 2)
    assert [found(tmp_path, 2, rank, 2) for rank in (0, 1)] == [(3, 30), (3, 31)]
    assert len(list((tmp_path / FOLDER).iterdir())) == 4, "two steps of each worker"
    # Another epoch, another number of workers: from the epoch's beginning.
    assert found(tmp_path, 1, 0, 2) is None
    assert found(tmp_path, 2, 0, 1) is None
    forget_within_epoch(tmp_path)
    assert found(tmp_path, 2, 0, 2) is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100])
def test_a_damaged_state_is_the_epochs_beginning(tmp_path, content):
    write_within_epoch(state(1), tmp_path, 0, 1, 0, 1)
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(content)
    assert found(tmp_path, 0) is None
    torch.save({"seed": 1}, file)
    assert found(tmp_path, 0) is None
    torch.save([1], file)
    assert found(tmp_path, 0) is None


@pytest.mark.parametrize(
    "changes",
    [{"objective": {"name": "free", "replays": 2}}, {"objective": "adversarial", "averaging": {"name": "ema", "start": 0}}],
    ids=["free", "ema"],
)
def test_what_a_step_leaves_for_the_next_one_is_kept(changes, tmp_path):
    """Free training keeps a perturbation from batch to batch, an average the weights so far."""
    splits = load_data(DataConfig(name="digits", limit_train=48, limit_test=16, validation_size=16))
    common = {"epochs": 1, "batch_size": 16, "precision": "fp32", "attack": {"steps": 1, "step_size": 0.05}}
    settings = TrainingConfig(**common | {"validation": {"steps": 1, "select": "last", "num_draws": 1}} | changes)

    def train(folder=None, reporter=None):
        model = build_model("at", backbone="resnet8", image_shape=(1, 8, 8), seed=1)
        fit(model, splits, ThreatModel(epsilon=0.1), settings, seed=0, reporter=reporter, resume_from=folder)
        return model.state_dict()

    whole = train()
    with pytest.raises(Killed):
        train(tmp_path, Interruption(tmp_path, 0, 2))
    resumed = train(tmp_path)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

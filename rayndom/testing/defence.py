"""What every defence promises as a trainable, resumable, storable thing: a suite that a defence inherits, ours and those of plug-ins."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import yaml

from models.randomness import ResampleOnForward, is_randomized, load_randomness_state, randomness_state
from models.registry import defence_model, parse_defence_section
from models.weights import load_pretrained, save_pretrained
from orchestration.catalogue import catalogue
from orchestration.experiment import ExperimentConfig
from orchestration.training.preparation import build_for
from rayndom.testing.cases import SMALLER, sharpen
from trainers.data import DataConfig, load_data
from trainers.fit import fit
from trainers.hardware import FULL
from trainers.objective import build_objective
from trainers.reporting import EpochReport, StopTraining
from trainers.step import StepContext
from trainers.streams import Streams


def experiment_of(name: str, **training) -> ExperimentConfig:
    """Return a run of two short epochs."""
    return ExperimentConfig(
        defence={"name": name} | SMALLER.get(name, {}),
        backbone="resnet18" if name == "ps_red" else "resnet8",
        data={"name": "digits", "limit_train": 48, "limit_test": 16, "validation_size": 16},
        threat_model={"epsilon": 0.1},
        training={
            "objective": catalogue()[name].objective,
            "attack": {"steps": 2, "step_size": 0.05},
            "epochs": 2,
            "batch_size": 16,
            "precision": "fp32",
            "optimizer": {"learning_rate": 0.05},
            "schedule": {"name": "one_cycle"},
            "validation": {"steps": 2, "num_draws": 2, "select": "last"},
        }
        | training,
    )


def train(experiment, splits, **kwargs):
    """Return the model that an experiment trains on a few digits, and how the training ended."""
    model = build_for(experiment, splits)
    result = fit(model, splits, experiment.threat_model, experiment.training, seed=experiment.seed, **kwargs)
    return model, result


class Killed(Exception):
    """Stands in for a machine that goes."""


class Interruption:
    """Ends a training after so many steps of an epoch (from 0), or after the epoch; what it was told to write until then is kept."""

    def __init__(self, folder: Path, epoch: int, step: int | None) -> None:
        self.folder, self.at, self.epochs = folder, (epoch, step), epoch
        self.steps: list[int] = []

    def epoch_finished(self, report: EpochReport, save) -> None:
        """Keep the epoch; end after the last one that is wanted."""
        self.epochs = report.epoch
        save(self.folder)
        if self.at == (report.epoch - 1, None):
            raise StopTraining

    def step_finished(self, step: int, num_steps: int, save) -> None:
        """Keep the last step that is wanted, and end."""
        self.steps.append(step)
        if self.at == (self.epochs, step):
            save(self.folder)
            raise Killed


class DefenceContract:
    """Trains, resumes to the bit, saves, loads and is configured. Parametrized with `name`, a name of the catalogue."""

    @pytest.fixture(scope="class")
    def splits(self):
        """A few digits."""
        return load_data(DataConfig(name="digits", limit_train=48, limit_test=16, validation_size=16))

    def test_a_resumed_run_ends_bit_identically(self, name, splits, tmp_path):
        """Interrupted amid the first epoch, after it, and amid the second one."""
        experiment = experiment_of(name)
        whole, uninterrupted = train(experiment, splits)
        with pytest.raises(Killed):
            train(experiment, splits, reporter=Interruption(tmp_path, 0, 2), resume_from=tmp_path)
        reporter = Interruption(tmp_path, 0, None)
        _, half = train(experiment, splits, reporter=reporter, resume_from=tmp_path)
        assert half.num_epochs == 1
        assert reporter.steps == [3], "two of its three steps were kept"
        with pytest.raises(Killed):
            train(experiment, splits, reporter=Interruption(tmp_path, 1, 1), resume_from=tmp_path)
        resumed, result = train(experiment, splits, resume_from=tmp_path)
        assert result.num_epochs == 2
        comparable = [
            {key: value for key, value in epoch.items() if not key.startswith(("time/", "memory/"))}
            for history in (uninterrupted.history, result.history)
            for epoch in history
        ]
        assert comparable[:2] == comparable[2:]
        for key, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[key]), key

    def test_one_small_training_step_lowers_the_loss_it_was_taken_on(self, name, splits):
        """Same batch, same draws, same starts, before and after a short step down the gradient.

        In float64 and with a very short step: cosines between input gradients (RED, TRS) bend sharply in fresh networks. Without the inner
        attack, whose signs jump with the weights.
        """
        experiment = experiment_of(name, attack={"steps": 0})
        training = experiment.training
        model = build_for(experiment, splits).double().train()
        sharpen(model)
        objective = build_objective(training.objective)
        objective.prepare(model)
        context = StepContext(
            threat_model=experiment.threat_model,
            attack=training.attack,
            redraw=training.redraw,
            streams=Streams(0),
            precision=FULL,
            num_epochs=2,
            steps_per_epoch=3,
        )
        x, y = splits.train.images_NCHW[:16].double() / 255, splits.train.labels[:16]
        losses = []
        for _ in range(2):
            context.streams.begin_epoch(model, 0)
            model.zero_grad()
            losses.append(objective.training_step(model, x, y, context)["loss"].item())
            objective.after_optimizer_step(model, context)
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            length = torch.stack([gradient.norm() for gradient in gradients]).norm()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-7 * parameter.grad / length
        assert losses[1] < losses[0]

    def test_saving_and_loading_give_equal_logits_and_a_loaded_randomized_model_stays_random(self, name, splits, tmp_path):
        model = build_for(experiment_of(name), splits).eval()
        folder = save_pretrained(model, tmp_path / "export")
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        x = torch.rand((4, *splits.image_shape), generator=torch.Generator().manual_seed(0))
        loaded = load_pretrained(folder, resample_on_forward=False)
        load_randomness_state(loaded, randomness_state(model))
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
            deployed = load_pretrained(folder)
            assert isinstance(deployed, ResampleOnForward) == is_randomized(model)
            outputs = [deployed(x) for _ in range(20)]
        assert any(not torch.equal(outputs[0], other) for other in outputs[1:]) == is_randomized(model)

    def test_the_configuration_survives_yaml_and_pickle(self, name):
        experiment = experiment_of(name)
        from_yaml = ExperimentConfig(**yaml.safe_load(yaml.safe_dump(experiment.model_dump(mode="json"))))
        from_pickle = pickle.loads(pickle.dumps(experiment))
        for other in (from_yaml, from_pickle):
            assert other == experiment
            assert other.fingerprint == experiment.fingerprint

    def test_every_preset_is_a_set_of_parameters(self, name):
        for preset in defence_model(name).presets.values():
            parse_defence_section({"name": name, **preset})

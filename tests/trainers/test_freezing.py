"""`training.freeze`: under every objective the named parts stay as they begin, all others learn, and a wrong name is refused at once."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from models.errors import UserError
from models.network_parts import freeze, tensors_of
from models.threat_model import ThreatModel
from orchestration.cli import main
from tests.contracts.test_objective import CASES, build, new_context, own_rows
from tests.trainers.tiny_training import StopAfterOne, few_digits, tiny_config
from trainers.averaging import AveragingConfig
from trainers.fit import fit
from trainers.optimizer import OptimizerConfig, build_optimizer


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_part_stays_as_it_is_under_every_objective(name):
    objective, model = build(name)
    prefix = next(name for name, _ in model.named_parameters() if name.endswith("classifier.weight")).removesuffix(".weight")
    freeze(model, [prefix.removeprefix("backbone.")])
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.1))
    x_BCHW, y_B = own_rows()
    objective.training_step(model, x_BCHW, y_B, new_context(model))
    optimizer.step()
    frozen = {name for name in before if name.startswith(prefix)}
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed, "nothing learns"
    assert not changed & frozen
    # Terms of some objectives leave out whole members; weight decay moves whatever has a gradient.
    first = {name for name in before if name.split(".")[:2] == prefix.split(".")[:2]} - frozen
    assert first <= changed or any("members" in name for name in before)


@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_a_training_with_frozen_parts_goes_on_where_it_stopped(averaging, tmp_path):
    def trained(**more):
        model = build_model("ctrw", backbone="resnet8", num_classes=10, image_shape=few_digits().image_shape, seed=0)
        begun = {name: value.clone() for name, value in model.state_dict().items()}
        config = tiny_config(freeze=("classifier", "layer1", "taps.0.mu"), averaging=AveragingConfig(name=averaging))
        result = fit(model, few_digits(), ThreatModel(epsilon=0.1), config, seed=0, **more)
        return begun, model.state_dict(), result

    begun, whole, _ = trained()
    trained(reporter=StopAfterOne(tmp_path))
    _, resumed, _ = trained(resume_from=tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    parameters = [
        name for name, _ in build_model("ctrw", backbone="resnet8", num_classes=10, image_shape=few_digits().image_shape).named_parameters()
    ]
    held = tensors_of(("classifier", "layer1", "taps.0.mu"), parameters, "freeze")
    assert held and all(torch.equal(begun[name], whole[name]) for name in held)
    assert all(not torch.equal(begun[name], whole[name]) for name in parameters if name.endswith("weight") and name not in held)


def test_nothing_left_to_train_is_refused():
    model = build_model("at", backbone="resnet8", num_classes=10, image_shape=(1, 8, 8))
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, ["backbone"])


def test_a_part_that_is_none_is_refused_before_a_run_begins(tmp_path, capsys):
    home = tmp_path / "home"
    assert main(["train", "at_digits", "--training.freeze", "[clasifier]", "--home", str(home)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "training.freeze: 'clasifier' is no tensor and no part of the network. Did you mean 'classifier'" in said
    assert not list(home.glob("runs/*/*.json"))

"""From the flags of `rayndom evaluate` to a model that Rayndom did not train, on the data set that was named for it."""

from __future__ import annotations

from pydantic import ValidationError

from models.errors import UserError
from models.external.source import TIMM, is_external_reference
from orchestration.home import Workplace
from orchestration.trained_models.external import known_external, read_external
from orchestration.trained_models.targets import Target, external_target
from trainers.data import DATASETS, DataConfig, load_data

_FLAGS = {"name": "--data", "folder": "--data-folder", "image_size": "--image-size"}


def named_data(name: str | None, folder: str | None, image_size: int | None) -> DataConfig | None:
    """Return the data set that `--data`, `--data-folder` and `--image-size` name; None: none is named.

    Raises:
        UserError: there is none of this name, or it cannot have this folder or size.
    """
    if name is None:
        for flag, value in (("--data-folder", folder), ("--image-size", image_size)):
            if value is not None:
                raise UserError(f"{flag} says how images of --data are read: name the data set, e.g. --data image_folder")
        return None
    try:
        return DataConfig(name=name, folder=folder, image_size=image_size)
    except ValidationError as error:
        said = []
        for item in error.errors():
            flag = _FLAGS.get(str(item["loc"][0]), "--data") if item["loc"] else "--data"
            said.append(f"{flag}: {item['msg'].removeprefix('Value error, ')}")
        raise UserError("; ".join(said).replace("data.folder", "--data-folder").replace("data.image_size", "--image-size")) from None


def external_from_flags(reference: str, weights: str | None, data: DataConfig | None, workplace: Workplace) -> Target | None:
    """Return the model that Rayndom did not train which a command line names; None: it names another one.

    Args:
        reference: what was typed as the model. weights, data: what its flags named.

    Raises:
        UserError: it cannot be built, its data set is not named, or it has flags that are for others.
    """
    if not is_external_reference(reference):
        if weights is not None:
            raise UserError(f"--weights is for a model of your own (FILE.py:CALLABLE or timm:NAME), {reference} has its weights")
        known = read_external(workplace.home, reference)
        if known is None:
            return None
        if data not in (None, known.data):
            raise UserError(
                f"{reference} was evaluated on {known.data.name}; to evaluate it on other images, name its code: {known.model.reference}"
            )
        return external_target(known, workplace.home)
    if data is None:
        raise UserError(f"{reference} does not say what its images are; name the data set with --data: {', '.join(DATASETS)}")
    num_classes, image_shape = None, None
    if reference.startswith(TIMM):
        test = load_data(data, workplace.data_root).test
        num_classes, image_shape = test.num_classes, test.image_shape
    return external_target(known_external(reference, weights, data, num_classes, image_shape), workplace.home)


def check_outputs(target: Target, num_classes: int, data: DataConfig) -> None:
    """Raise a `UserError` where a model that Rayndom did not train has another number of classes than its data set."""
    expected = DATASETS[data.name].num_classes
    if target.external is not None and expected is not None and num_classes != expected:
        raise UserError(f"{target.external.model.reference} returns {num_classes} logits, {data.name} has {expected} classes")

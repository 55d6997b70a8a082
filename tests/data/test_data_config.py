"""What a user may and may not write in the data section."""

import pytest
from pydantic import ValidationError

from trainers.data import DATASETS, Augmentation, DataConfig


def test_the_default_is_the_embedded_digits_at_their_own_size():
    config = DataConfig()
    assert (config.name, config.image_size, config.augmentation) == ("digits", None, "none")
    assert config.training_augmentation() == Augmentation("none", 4)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValidationError, match=r"unknown data set 'cifar-10'.*Did you mean 'cifar10'"):
        DataConfig(name="cifar-10")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "image_folder"}, "needs data.folder"),
        ({"name": "cifar10", "folder": "pictures"}, "only for 'image_folder', 'hugging_face', 'webdataset'"),
        ({"name": "cifar10", "streamed": True}, "decides for itself"),
        ({"name": "hugging_face"}, "needs data.folder"),
        ({"name": "webdataset", "folder": "shards", "streamed": True}, "decides for itself"),
        ({"name": "image_folder", "folder": "pictures", "label_column": "label"}, "only for hugging_face and webdataset"),
        ({"name": "imagenet", "augmentation": "crop_flip"}, "allowed: none, random_resized_crop"),
        ({"image_size": 0}, "greater than or equal to 4"),
        ({"validation_size": -1}, "greater than or equal to 0"),
        ({"limit_train": 0}, "greater than or equal to 1"),
        ({"augmentation": "mixup"}, "'none', 'crop', 'crop_flip' or 'random_resized_crop'"),
        ({"root": "somewhere"}, "Extra inputs are not permitted"),
    ],
)
def test_mistakes_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)


def test_only_imagenet_and_folders_that_ask_for_it_stream():
    assert [name for name, info in DATASETS.items() if info.streams] == ["imagenet"]
    assert not DataConfig(name="image_folder", folder="x").streams
    assert DataConfig(name="image_folder", folder="x", streamed=True).streams


def test_every_field_is_described_and_every_data_set_documented():
    assert all(field.description for field in DataConfig.model_fields.values())
    for name, info in DATASETS.items():
        assert info.name == name
        assert info.description
        channels = info.image_shape[0] if info.image_shape else 3
        assert len(info.mean) == len(info.std) == channels
        assert all(0 < value < 1 for value in (*info.mean, *info.std))
        assert name == "digits" or (info.how_to_obtain and (info.files or info.needs_folder))

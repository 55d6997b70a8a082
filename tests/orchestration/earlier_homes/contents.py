"""What `make_home.py` and the tests of its home share: it needs nothing of the project, whose commits differ."""

PLACE = "/HOME-OF-THE-TEST"
TINY = {
    "data.limit_train": "96",
    "data.validation_size": "32",
    "training.batch_size": "32",
    "training.validation.num_examples": "16",
    "training.attack.steps": "1",
    "training.precision": "fp32",
    "backbone.name": "timm:resnet18",
    "backbone.options": "{channels: [4, 4, 4, 4], output_stride: 8}",
}

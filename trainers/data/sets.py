"""The data sets Rayndom knows: what each one is, how its pixels are normalized, and where its files are looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.plugins import once_for_plugins
from models.registry_files import modules_of_plugins, skip

DIGIT_NAMES = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class DatasetInfo:
    """One data set: what it is, its shapes, its pixel statistics, and where its files belong."""

    name: str
    description: str
    num_classes: int | None
    """K; None: discovered from the class folders."""
    image_shape: tuple[int, int, int] | None
    """Native (C, H, W); None: discovered from the images."""
    mean: tuple[float, ...]
    """Mean of each channel over the training pixels in [0, 1]; the model subtracts it."""
    std: tuple[float, ...]
    """Standard deviation of each channel over the training pixels in [0, 1]; the model divides by it."""
    num_train: int | None = None
    """Training images of the published set, before any are held out for validation."""
    num_test: int | None = None
    streams: bool = False
    """Whether images are decoded while training instead of living on the device."""
    class_names: tuple[str, ...] | None = None
    """Names in label order where they are fixed; None: read from the files."""
    folders: tuple[str, ...] = ()
    """Folders searched in turn, below the data root."""
    system_folders: tuple[str, ...] = ()
    """Absolute folders searched after those below the data root (where system packages install)."""
    files: tuple[str, ...] = ()
    """Files and folders that must all be in one of the folders."""
    needs_folder: bool = False
    """Whether the user names its folder by `data.folder`: it has no place of its own."""
    compressed_suffix: str = ""
    """A suffix that a file of `files` may carry as well, such as `.gz`."""
    how_to_obtain: str = ""
    """One or two sentences for the user whose files are missing; `{root}` stands for the data root."""
    read: Callable[[Path], Any] | None = None
    """Of a plug-in's data set: reads all of it from below the data root, as `RawImages` of `array_files`, or raises a `UserError`."""


_ALL = (
    DatasetInfo(
        name="digits",
        description="1,797 handwritten digits, 8x8 grey, inside scikit-learn; split 1,437 / 360 once and for all.",
        num_classes=10,
        image_shape=(1, 8, 8),
        mean=(0.3058,),
        std=(0.3759,),
        num_train=1437,
        num_test=360,
        class_names=DIGIT_NAMES,
    ),
    DatasetInfo(
        name="fashion_mnist",
        description="Fashion-MNIST: 70,000 articles of clothing, 28x28 grey, 10 classes.",
        num_classes=10,
        image_shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        num_train=60_000,
        num_test=10_000,
        class_names=(
            "t-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        folders=("FashionMNIST/raw", "fashion_mnist", "fashion-mnist"),
        system_folders=("/usr/share/datasets/fashion-mnist",),
        files=(
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        ),
        compressed_suffix=".gz",
        how_to_obtain="On Debian and Ubuntu: apt-get install dataset-fashion-mnist (found without any copying). "
        "Elsewhere put the four idx files, plain or .gz, into {root}/fashion_mnist.",
    ),
    DatasetInfo(
        name="cifar10",
        description="CIFAR-10: 60,000 photographs, 32x32 colour, 10 classes.",
        num_classes=10,
        image_shape=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        num_train=50_000,
        num_test=10_000,
        folders=("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar10"),
        files=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
        how_to_obtain="Unpack cifar-10-python.tar.gz (the 'python version' archive of the CIFAR-10 page) in {root}; it "
        "makes the folder cifar-10-batches-py, the one torchvision uses.",
    ),
    DatasetInfo(
        name="cifar100",
        description="CIFAR-100: 60,000 photographs, 32x32 colour, 100 fine classes.",
        num_classes=100,
        image_shape=(3, 32, 32),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        num_train=50_000,
        num_test=10_000,
        folders=("cifar-100-python", "cifar100/cifar-100-python", "cifar100"),
        files=("train", "test", "meta"),
        how_to_obtain="Unpack cifar-100-python.tar.gz (the 'python version' archive of the CIFAR-100 page) in {root}; "
        "it makes the folder cifar-100-python, the one torchvision uses.",
    ),
    DatasetInfo(
        name="svhn",
        description="Street View House Numbers, cropped digits: 73,257 + 26,032 pictures, 32x32 colour, 10 classes.",
        num_classes=10,
        image_shape=(3, 32, 32),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        num_train=73_257,
        num_test=26_032,
        class_names=DIGIT_NAMES,
        folders=("svhn", "SVHN", "."),
        files=("train_32x32.mat", "test_32x32.mat"),
        how_to_obtain="Put train_32x32.mat and test_32x32.mat (format 2, 'cropped digits', of the SVHN page) into {root}/svhn.",
    ),
    DatasetInfo(
        name="tiny_imagenet",
        description="Tiny ImageNet: 100,000 + 10,000 photographs, 64x64 colour, 200 classes; `val` is the test set.",
        num_classes=200,
        image_shape=(3, 64, 64),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        num_train=100_000,
        num_test=10_000,
        folders=("tiny-imagenet-200", "tiny_imagenet/tiny-imagenet-200", "tiny_imagenet"),
        files=("train", "val/images", "val/val_annotations.txt"),
        how_to_obtain="Unpack tiny-imagenet-200.zip in {root}; it makes the folder tiny-imagenet-200 with "
        "train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt.",
    ),
    DatasetInfo(
        name="imagenet",
        description="ImageNet (ILSVRC 2012): 1.28 million photographs, 1,000 classes; `val` is the test set.",
        num_classes=1000,
        image_shape=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_train=1_281_167,
        num_test=50_000,
        streams=True,
        folders=("imagenet", "ILSVRC2012", "."),
        files=("train", "val"),
        how_to_obtain="It needs train/<wnid>/*.JPEG and val/<wnid>/*.JPEG. Put ILSVRC2012_img_train.tar, "
        "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into {root}/imagenet and open that folder once with "
        "torchvision.datasets.ImageNet, for split='train' and for split='val': it unpacks them into this layout.",
    ),
    DatasetInfo(
        name="image_folder",
        description="Any tree of train/<class>/ and test/<class>/ image files, read as RGB; mean and std are measured.",
        num_classes=None,
        image_shape=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        files=("train", "test"),
        needs_folder=True,
        how_to_obtain="It needs train/<class>/<image files> and test/<class>/<image files>, the same classes in both. "
        "`--data.folder` names the folder that holds them.",
    ),
    DatasetInfo(
        name="hugging_face",
        description="A folder that Hugging Face's `datasets` reads (save_to_disk, or a copy of a repository); mean and std are measured.",
        num_classes=None,
        image_shape=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        needs_folder=True,
        how_to_obtain="It needs what `DatasetDict.save_to_disk` wrote, or the files of a dataset's repository, with splits train and test. "
        "`--data.folder` names the folder.",
    ),
    DatasetInfo(
        name="webdataset",
        description="A folder of WebDataset shards (train-*.tar, test-*.tar) of pictures and labels; mean and std are measured.",
        num_classes=None,
        image_shape=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        needs_folder=True,
        how_to_obtain="It needs .tar files whose names say train and test, with a picture and a label (`.cls`, or `label` of a `.json`) "
        "for each key. `--data.folder` names the folder that holds them.",
    ),
)

SHIPPED: Mapping[str, DatasetInfo] = {info.name: info for info in _ALL}
"""The data sets that come with Rayndom."""


class _DataSets(Mapping[str, DatasetInfo]):
    """The shipped data sets, then those that plug-ins name in a tuple `DATA_SETS`; a plug-in cannot take the name of a shipped one."""

    def __getitem__(self, name: str) -> DatasetInfo:
        return SHIPPED[name] if name in SHIPPED else _of_plugins()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*SHIPPED, *_of_plugins()]))

    def __len__(self) -> int:
        return len(list(iter(self)))


@once_for_plugins
def _of_plugins() -> dict[str, DatasetInfo]:
    found: dict[str, DatasetInfo] = {}
    for module in modules_of_plugins(__name__, "DATA_SETS"):
        for info in module.DATA_SETS:
            if isinstance(info, DatasetInfo) and info.read is not None and info.name not in SHIPPED:
                found[info.name] = info
            else:
                skip(__name__, module.__name__, "DATA_SETS should be a tuple of DatasetInfo, each with a name of its own and `read`")
    return found


DATASETS: Mapping[str, DatasetInfo] = _DataSets()
"""Every data set by the name users type."""

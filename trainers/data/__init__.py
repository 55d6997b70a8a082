"""Data sets as disjoint train, validation and test splits, and the batches drawn from them.

`load_data(DataConfig(...))` reads a data set into `Splits`; `training_batches` and `evaluation_batches` iterate over a
split. Small sets live on the device as uint8 and are augmented there in whole batches; ImageNet-size sets are decoded
while training.
"""

from trainers.data.augmentation import Augmentation
from trainers.data.batches import evaluation_batches, training_batches
from trainers.data.config import DataConfig
from trainers.data.device_batches import DeviceBatches
from trainers.data.load import load_data
from trainers.data.location import data_root
from trainers.data.sets import DATASETS, DatasetInfo
from trainers.data.sharding import shard_range
from trainers.data.split import ArraySplit, Splits, StreamedSplit
from trainers.data.streaming import StreamedBatches

__all__ = [
    "DATASETS",
    "ArraySplit",
    "Augmentation",
    "DataConfig",
    "DatasetInfo",
    "DeviceBatches",
    "Splits",
    "StreamedBatches",
    "StreamedSplit",
    "data_root",
    "evaluation_batches",
    "load_data",
    "shard_range",
    "training_batches",
]

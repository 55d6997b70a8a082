"""The data section of an experiment: which set, what size, split and augmented how; not where its files lie."""

from pydantic import Field, field_validator, model_validator

from models.configuration import MOST_IMAGES, Config
from models.errors import UserError, unknown_name
from trainers.data.augmentation import STREAMED_AUGMENTATIONS, Augmentation, AugmentationName
from trainers.data.mixing import MixingName
from trainers.data.policies import PolicyName
from trainers.data.sets import DATASETS, SHIPPED

LARGEST_PIXEL_STATISTIC = 1.0
SMALLEST_PIXEL_STD = 1e-3
WITH_LABEL_COLUMN = ("hugging_face", "webdataset")
"""Data sets whose labels may stand under any name."""


class DataConfig(Config):
    """Which images a run trains, selects and reports on. All fields are scientific: they belong to the fingerprint."""

    name: str = Field("digits", description=f"Data set: {', '.join(SHIPPED)}.")
    folder: str | None = Field(
        None,
        description="image_folder, hugging_face, webdataset: the folder that holds it; a name under the data root, or an absolute path.",
    )
    label_column: str | None = Field(
        None,
        min_length=1,
        description="hugging_face: the column of the labels, where several could be; webdataset: their key in each `.json`.",
    )
    streamed: bool = Field(
        False,
        description="image_folder only: decode images while training instead of holding them on the device, for trees "
        "larger than memory. imagenet always streams.",
    )
    image_size: int | None = Field(
        None,
        ge=4,
        le=1024,
        description="Side in pixels that images are resized to (square; bilinear, antialiased). Null: the set's own "
        "size; 224 when streamed.",
    )
    validation_size: int | None = Field(
        None,
        ge=0,
        le=MOST_IMAGES,
        description="Training images held out for validation, the same share of each class. Null: a tenth of the "
        "training set, at most 5,000. 0: none, as papers do that select on the test set.",
    )
    split_seed: int = Field(0, ge=0, lt=2**63, description="Seed that chooses the validation images; runs to compare share it.")
    augmentation: AugmentationName = Field(
        "none",
        description="Training augmentation: none; crop (zero padding, random crop); crop_flip (and random mirror "
        "image; wrong for digits); random_resized_crop (and random mirror image).",
    )
    pixel_mean: tuple[float, ...] | None = Field(
        None, description="Channel means that the network subtracts from pixels of [0,1]. Null: the set's own; [0, 0, 0]: nothing."
    )
    pixel_std: tuple[float, ...] | None = Field(
        None, description="Channel standard deviations that the network divides pixels by. Null: the set's own; [1, 1, 1]: nothing."
    )
    crop_padding: int = Field(
        4,
        ge=0,
        le=16,
        description="Zero padding on each side for crop and crop_flip, in pixels of a 32x32 image; scaled with the "
        "image's side (4 means 1 at side 8, 2 at 16, 4 at 28 and 32, 8 at 64).",
    )
    policy: PolicyName = Field(
        "none",
        description="What is done to each image after crop and mirror image, one by one: torchvision's `rand_augment`, `auto_augment`, "
        "`trivial_augment`; `idbh_weak`, `idbh_strong` (Li and Spratling 2023: with crop_flip and crop_padding 0).",
    )
    policy_magnitude: int = Field(9, ge=0, le=30, description="rand_augment: how strongly (Cubuk et al. 2020: 9).")
    mixing: MixingName = Field(
        "none", description="Mix each image with the next one of its batch: `mixup` (Zhang et al. 2018), `cutmix` (Yun et al. 2019)."
    )
    mixing_alpha: float = Field(1.0, gt=0, le=1000, description="Shares of the two are drawn from Beta(alpha, alpha).")
    extra_images: str | None = Field(
        None,
        min_length=1,
        description="A .npz file of further training images: `images` (M, H, W, C), uint8, and `labels`; below the data root, or absolute.",
    )
    extra_share: float = Field(0.7, gt=0, le=0.99, description="Share of the further images in every batch (Gowal et al. 2021: 0.7).")
    limit_train: int | None = Field(
        None,
        ge=1,
        le=MOST_IMAGES,
        description="Use at most so many training images, evenly over the classes, first ones first; for quick runs.",
    )
    limit_test: int | None = Field(
        None,
        ge=1,
        le=MOST_IMAGES,
        description="Use at most so many test images, evenly over the classes, first ones first; for quick runs.",
    )

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        if name not in DATASETS:
            raise unknown_name("data set", name, DATASETS)
        return name

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        info = DATASETS[self.name]
        if info.needs_folder and not self.folder:
            raise UserError(f"data set {self.name!r} needs data.folder. {info.how_to_obtain}")
        if not info.needs_folder and self.folder is not None:
            with_folder = ", ".join(repr(name) for name in DATASETS if DATASETS[name].needs_folder)
            raise UserError(f"data.folder is only for {with_folder}; {self.name!r} is looked for under the data root")
        if self.label_column is not None and self.name not in WITH_LABEL_COLUMN:
            raise UserError(f"data.label_column is only for {' and '.join(WITH_LABEL_COLUMN)}; the labels of {self.name!r} are known")
        if self.name != "image_folder" and self.streamed:
            raise UserError(f"data.streamed is only for 'image_folder'; {self.name!r} decides for itself")
        self._normalizes_channels()
        for name, is_set in (("policy", self.policy != "none"), ("mixing", self.mixing != "none"), ("extra_images", self.extra_images)):
            if self.streams and is_set:
                raise UserError(f"data.{name} is not available for streamed images")
        if self.policy != "none" and self.augmentation == "random_resized_crop":
            raise UserError("data.policy changes whole numbers of pixels; data.augmentation random_resized_crop leaves none: use crop_flip")
        if self.streams and self.augmentation not in STREAMED_AUGMENTATIONS:
            raise UserError(
                f"data.augmentation {self.augmentation!r} is not available for streamed images; "
                f"allowed: {', '.join(STREAMED_AUGMENTATIONS)}"
            )
        return self

    def _normalizes_channels(self) -> None:
        shape = DATASETS[self.name].image_shape
        for name, values in (("pixel_mean", self.pixel_mean), ("pixel_std", self.pixel_std)):
            if values is not None and shape is not None and len(values) != shape[0]:
                raise UserError(f"data.{name} has {len(values)} numbers; images of {self.name} have {shape[0]} channels")
            if values is not None and not all(abs(value) <= LARGEST_PIXEL_STATISTIC for value in values):
                raise UserError(f"data.{name} {values}: pixels are in [0,1]; did you mean {values[0]:g}/255?")
        if self.pixel_std is not None and min(self.pixel_std, default=0) < SMALLEST_PIXEL_STD:
            raise UserError(f"data.pixel_std {self.pixel_std}: each is at least {SMALLEST_PIXEL_STD:g}")

    @property
    def streams(self) -> bool:
        """Whether images are decoded while training."""
        return self.streamed or DATASETS[self.name].streams

    def training_augmentation(self) -> Augmentation:
        """Return the augmentation of training images."""
        return Augmentation(self.augmentation, self.crop_padding, self.policy, self.policy_magnitude, self.mixing, self.mixing_alpha)

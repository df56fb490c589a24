"""The configuration of a study: what is compared, and how every run is trained; plain data that needs no torch."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from normkit.study.errors import StudyError

if TYPE_CHECKING:
    from normkit.study.data.augmentation import Augmentation

Schedule = Literal["cosine", "step", "two-step", "one-cycle", "constant"]


@dataclass(frozen=True)
class Training:
    """How every run is trained.

    Attributes:
        optimizer: Optimizer of the methods that do not bring their own.
        momentum: Momentum of SGD-like optimizers.
        weight_decay: Weight decay.
        schedule: How the learning rate goes over a run.
        warm_up: Share of the steps over which the learning rate rises linearly, in [0, 1).
        label_smoothing: Share of the label spread over all classes, in [0, 1).
        ema: Decay of an average of the weights that is evaluated in their place; 0 for none.
        flip: Mirror training images at random.
        crop: Reflect-pad training images by this many pixels and cut their size out at random; 0 for none.
        amp: Forward in bfloat16 where it is safe (autocast), weights in fp32.
        channels_last: Memory layout NHWC.
        compile: Compile the model for training.
        micro_batch: Split each batch into pieces of this size whose gradients accumulate; 0 for whole batches.
    """

    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warm_up: float = 0.05
    label_smoothing: float = 0.0
    ema: float = 0.0
    flip: bool = False
    crop: int = 0
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    micro_batch: int = 0

    @property
    def augmentation(self) -> "Augmentation":
        """What happens to training images."""
        from normkit.study.data.augmentation import Augmentation  # the only part that needs torch

        return Augmentation(self.flip, self.crop)

    def validate(self) -> None:
        """Check the values.

        Raises:
            StudyError: Names the argument, the value and the remedy.
        """
        for flag, share in (
            ("--momentum", self.momentum),
            ("--warm-up", self.warm_up),
            ("--label-smoothing", self.label_smoothing),
            ("--ema", self.ema),
        ):
            if not 0 <= share < 1:
                raise StudyError(f"{flag} {share}: give a number in [0, 1)")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise StudyError(f"--weight-decay {self.weight_decay}: give a number that is not negative")
        for flag, count in (("--crop", self.crop), ("--micro-batch", self.micro_batch)):
            if count < 0:
                raise StudyError(f"{flag} {count}: give a positive number, or 0 to switch it off")


@dataclass(frozen=True)
class StudyConfig(Training):
    """What is compared, and how (see also ``Training``); studies with equal configurations are the same study.

    Attributes:
        data: Name of a data set, see ``normkit.study.data.load.load_data``.
        model: Name of a model, see ``normkit.study.models.build_model``.
        methods: Names out of [`normkit.recipes`][].
        batch_sizes: Examples per optimizer step.
        seeds: Number of final runs per method and batch size.
        budget: Training examples a run sees, the same for every method and batch size.
        lr: ``"auto"``, one learning rate for all, or one for each method.
        lr_points: Grid points of the search, each a factor sqrt(10) apart.
        search_seeds: Runs per grid point.
        validation: Share of the training data that validates, or from 1 up the number of examples, classes in proportion;
            data that comes with a validation split uses that.
        best_weights: Judge the weights with the best validation accuracy of a run instead of the last; a run is then
            validated after every epoch too.
        alternative: Alternative hypothesis of the test: ``two-sided`` or ``greater``.
        device: ``cpu`` or a CUDA device.
        image_column: Column with the images, for data that has columns.
        label_column: Column with the classes.
        image_size: Height and width that images are brought to.
        limit: At most this many examples of each split.
        prune: Give up search runs that are below the median of their peers.
    """

    data: str = "digits"
    model: str = "digits-cnn"
    methods: tuple[str, ...] = ("batch", "group")
    batch_sizes: tuple[int, ...] = (64, 8, 1)
    seeds: int = 3
    budget: int = 1500
    lr: float | dict[str, float] | Literal["auto"] = "auto"
    lr_points: int = 5
    search_seeds: int = 1
    validation: float = 0.2
    best_weights: bool = False
    alternative: Literal["two-sided", "greater"] = "two-sided"
    device: str = "cpu"
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    limit: int | None = None
    prune: bool = False

    @property
    def reference(self) -> str:
        """The method that the others are paired with."""
        return "batch" if "batch" in self.methods else self.methods[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready data (tuples become lists)."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "StudyConfig":
        """Inverse of ``to_dict``."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)

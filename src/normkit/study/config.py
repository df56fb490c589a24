"""How every run of a study is trained, whatever the method: optimizer, schedule, precision, augmentation."""

import math
from dataclasses import dataclass
from typing import Literal

from normkit.study.data.augmentation import Augmentation
from normkit.study.errors import StudyError
from normkit.study.train.schedules import Schedule


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
    def augmentation(self) -> Augmentation:
        """What happens to training images."""
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

"""Configurations as plain data; the command line parses these classes, and none of them needs torch."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from normkit._errors import nearest
from normkit.study.errors import StudyError

if TYPE_CHECKING:
    from normkit.study.data.augmentation import Augmentation
    from normkit.study.records import Phase

Schedule = Literal["cosine", "step", "two-step", "one-cycle", "constant"]
Scaling = Literal["standardized", "unit", "symmetric"]
Rates = float | dict[str, float] | Literal["auto"]

# types with what the command line's help shows in the place of a value
Count = Annotated[int, arg(metavar="COUNT")]
Data = Annotated[str, arg(metavar="DATA")]
Device = Annotated[str, arg(metavar="DEVICE")]
Flag = Annotated[bool, arg(help_behavior_hint="")]
Fraction = Annotated[float, arg(metavar="FRACTION")]
Method = Annotated[str, arg(metavar="METHOD")]
Methods = Annotated[tuple[str, ...], arg(metavar="METHOD,...")]
Model = Annotated[str, arg(metavar="MODEL")]
Number = Annotated[float, arg(metavar="NUMBER")]
OptionalColumn = Annotated[str | None, arg(metavar="COLUMN", help_behavior_hint="")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
OptionalMethods = Annotated[tuple[str, ...], arg(metavar="METHOD,...", help_behavior_hint="")]
OptionalNumber = Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="")]
OptionalPixels = Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")]
OptionalPlace = Annotated[str | None, arg(metavar="FILE.py:NAME", help_behavior_hint="")]
OptionalSamples = Annotated[int | None, arg(metavar="SAMPLES", help_behavior_hint="")]
Pixels = Annotated[int, arg(metavar="PIXELS")]
Samples = Annotated[int, arg(metavar="SAMPLES")]
Seed = Annotated[int, arg(metavar="NUMBER")]
Size = Annotated[int, arg(metavar="SIZE")]
Sizes = Annotated[tuple[int, ...], arg(metavar="SIZE,...")]
Span = Annotated[tuple[float, float], arg(metavar="LOW,HIGH")]
Split = Annotated[str, arg(metavar="SPLIT")]
Steps = Annotated[int, arg(metavar="STEPS")]

OF_NAMED_DATA = (  # options of classification by name, which a task of one's own has no use for
    *("data", "model", "image_column", "label_column", "image_size", "limit"),
    *("train_split", "scaling", "label_smoothing", "flip", "crop"),
)


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        task: Your own task, FILE.py:name or package.module:name: a normkit.Task, or a function that returns one; it replaces
            data and model.
        data: digits, spiral, a Hugging Face name, a local folder, or your own: FILE.py:factory, package.module:factory.
        model: A name such as resnet20, or your own: FILE.py:factory, package.module:factory.
        methods: Recipes, see `normkit recipes`, with settings if need be: revisited:scale=0.2:scale_lr_divisor=10.
        batch_sizes: Samples per optimizer step.
        budget: Training samples that a run sees, the same for every method and batch size.
        lr: auto (searched for every method and batch size), one learning rate for all, or one for each method
            (batch=0.1,sgd-g=0.2).
        seeds: Final runs per method and batch size.
    """

    task: OptionalPlace = None
    data: Data = "digits"
    model: Model = "mlp"
    methods: Methods = ("none", "batch", "group", "bnp", "group+bnp")
    batch_sizes: Sizes = (64, 8, 1)
    budget: Samples = 1500
    lr: Rates = "auto"
    seeds: Count = 3


@dataclass(frozen=True)
class Selection:
    """How learning rates and weights are chosen, and how methods are tested against the reference.

    Attributes:
        lr_points: Grid points of the learning-rate search, a factor sqrt(10) apart.
        lr_extend: Points that the search may add at each end of a grid, until the best rate lies inside.
        search_seeds: Runs per grid point.
        search_budget: Training samples that a run of the search sees: a fraction of the budget, or a number > 1 of samples.
        prune: Stop search runs that are below the median of the other learning rates at the same point.
        validation: Fraction of the training data held out for validation; a number >= 1 counts samples. A validation split
            that comes with the data is used as it is.
        best_weights: Test the best checkpoint by validation score (checked every epoch) instead of the last.
        alternative: Alternative hypothesis of the paired test.
        primary: Methods whose comparisons are named beforehand: they alone are tested, the others are exploratory. By default
            all methods are tested, batch size by batch size.
        margin: Largest difference that counts as none, in points of a score in percent, else in the score's unit: the report
            says which methods are the same within it, no worse, or not decided.
    """

    lr_points: Count = 3
    lr_extend: Count = 3
    search_seeds: Count = 1
    search_budget: Fraction = 1.0
    prune: Flag = False
    validation: Fraction = 0.2
    best_weights: Flag = False
    alternative: Literal["two-sided", "greater"] = "two-sided"
    primary: OptionalMethods = ()
    margin: OptionalNumber = None


@dataclass(frozen=True)
class Loading:
    """How data are read.

    Attributes:
        train_split: Training split, or several joined by +: train+extra of SVHN.
        limit: Use at most this many samples of each split.
        image_column: Column with the images; by default found by its type.
        label_column: Column with the classes; by default found by its type.
        image_size: Resize images to this height and width.
        scaling: Images standardized by the training data's mean and deviation per channel, or brought to [0, 1] (unit) or
            [-1, 1] (symmetric).
        data_workers: Processes that fetch samples of a task ahead, for each trial; 0 to fetch them in the trial itself.
    """

    train_split: Split = "train"
    limit: OptionalSamples = None
    image_column: OptionalColumn = None
    label_column: OptionalColumn = None
    image_size: OptionalPixels = None
    scaling: Scaling = "standardized"
    data_workers: Count = 0


@dataclass(frozen=True)
class Training:
    """How every run is trained, whatever the method.

    Attributes:
        optimizer: Optimizer of the methods that do not bring their own.
        momentum: Momentum of SGD-like optimizers.
        weight_decay: Weight decay.
        schedule: Learning-rate schedule.
        warm_up: Fraction of the steps over which the learning rate rises linearly, in [0, 1).
        label_smoothing: Fraction of the label spread over all classes, in [0, 1).
        ema: Decay of the exponential moving average of the weights that is evaluated in their place; 0 for none.
        flip: Mirror training images at random.
        crop: Pad training images by this many pixels, reflecting, and crop at random to their size; 0 for none.
        amp: Run the forward in bfloat16 where that is safe (autocast), with weights in fp32.
        channels_last: Use the memory layout NHWC.
        compile: Compile the model for training.
        micro_batch: Split each batch into micro-batches of this size whose gradients accumulate; 0 for whole batches.
        device: cpu, or a CUDA device.
    """

    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] = "sgd"
    momentum: Number = 0.9
    weight_decay: Number = 0.0
    schedule: Schedule = "cosine"
    warm_up: Fraction = 0.05
    label_smoothing: Fraction = 0.0
    ema: Fraction = 0.0
    flip: Flag = False
    crop: Pixels = 0
    amp: Flag = False
    channels_last: Flag = False
    compile: Flag = False
    micro_batch: Size = 0
    device: Device = "cpu"

    @property
    def augmentation(self) -> "Augmentation":
        """The augmentation of training images."""
        from normkit.study.data.augmentation import Augmentation  # the only part that needs torch

        return Augmentation(self.flip, self.crop)

    def validate(self) -> None:
        """Check the values.

        Raises:
            StudyError: Names the argument, the value and the remedy.
        """
        for flag, fraction in (
            ("--momentum", self.momentum),
            ("--warm-up", self.warm_up),
            ("--label-smoothing", self.label_smoothing),
            ("--ema", self.ema),
        ):
            if not 0 <= fraction < 1:
                raise StudyError(f"{flag} {fraction}: give a number in [0, 1)")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise StudyError(f"--weight-decay {self.weight_decay}: give a number that is not negative")
        for flag, number in (("--crop", self.crop), ("--micro-batch", self.micro_batch)):
            if number < 0:
                raise StudyError(f"{flag} {number}: give a positive number, or 0 to switch it off")


@dataclass(frozen=True)
class StudyConfig(Training, Loading, Selection, Comparison):
    """What is compared, and how; studies with equal configurations are the same study.

    Its options are those of [`Comparison`][normkit.study.config.Comparison], [`Selection`][normkit.study.config.Selection],
    [`Loading`][normkit.study.config.Loading] and [`Training`][normkit.study.config.Training].

    Attributes:
        higher_is_better: Whether a higher score of the task is a better one; the task says it.
    """

    higher_is_better: bool = True

    def judged_by(self, higher_is_better: bool) -> "StudyConfig":
        """Return the study with the task's direction of the score.

        Args:
            higher_is_better: Whether a higher score is a better one.
        """
        return replace(self, higher_is_better=higher_is_better)

    @property
    def subject(self) -> str:
        """The data or the task, as the user called it."""
        return self.task or self.data

    @property
    def reference(self) -> str:
        """The method that the others are paired with."""
        return "batch" if "batch" in self.methods else self.methods[0]

    @property
    def validation_amount(self) -> float | int:
        """How much is held out: a fraction, or a number of samples."""
        return self.validation if self.validation < 1 else int(self.validation)

    def budget_of(self, phase: "Phase") -> int:
        """Training samples that a run sees, at least one batch of every size.

        Args:
            phase: ``search`` or ``final``.

        Examples:
            >>> StudyConfig(budget=1000, search_budget=0.25).budget_of("search"), StudyConfig(budget=1000).budget_of("search")
            (250, 1000)
        """
        if phase == "final":
            return self.budget
        share = self.search_budget
        return max(round(share * self.budget) if share <= 1 else int(share), *self.batch_sizes)

    @property
    def most_at_once(self) -> int:
        """Samples in the largest forward pass of training."""
        return self.micro_batch or max(self.batch_sizes)

    def validate(self) -> None:
        """Check the values.

        Raises:
            StudyError: Names the argument, the value and the remedy.
        """
        super().validate()
        others = [method for method in self.methods if method != self.reference]
        for method in self.primary:
            if method == self.reference:
                raise StudyError(
                    f"--primary: {method} is the reference, which the others are compared with; leave it out"
                )
            if method not in others:
                raise StudyError(
                    f"--primary: {method!r} is not planned; {nearest(method, others)}, or add it to --methods"
                )
        if len({*self.primary}) < len(self.primary):
            raise StudyError(f"--primary {','.join(self.primary)}: name each method once")
        if self.margin is not None and not (self.margin > 0 and math.isfinite(self.margin)):
            raise StudyError(f"--margin {self.margin}: give a positive number, or leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-ready data (tuples become lists)."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "StudyConfig":
        """Inverse of ``to_dict``."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class LandscapeConfig:
    """What is trained and measured.

    Attributes:
        task: Your own task, FILE.py:name or package.module:name, in place of data and model.
        data: digits, spiral, a Hugging Face name, a local folder, or your own: FILE.py:factory, package.module:factory.
        model: A name such as vgg13-small, or your own: FILE.py:factory, package.module:factory.
        methods: Recipes, see `normkit recipes`, or none+noise: the noise of noisy-batch without normalization.
        batch_size: Samples per optimizer step.
        steps: Optimizer steps of each run.
        every: Steps from one measurement to the next; a measurement costs about as much as 15 steps.
        lr: Learning rate of all methods, and the unit of the walk along the gradient.
        momentum: Momentum; the paper uses plain SGD.
        weight_decay: Weight decay.
        initialization: Initial weights: those of the model, or Glorot's.
        seed: Seed of weights and data order, the same for all methods.
        span: Smallest and largest step size of the walk, in units of the learning rate.
        limit: Use at most this many samples of each split.
        device: cpu, or a CUDA device.
    """

    task: OptionalPlace = None
    data: Data = "digits"
    model: Model = "digits-cnn"
    methods: Methods = ("none", "batch", "noisy-batch", "none+noise", "bnp", "l1")
    batch_size: Size = 128
    steps: Count = 200
    every: Steps = 20
    lr: Number = 0.1
    momentum: Number = 0.0
    weight_decay: Number = 0.0
    initialization: Literal["model", "glorot"] = "model"
    seed: Seed = 0
    span: Span = (0.5, 4.0)
    limit: OptionalSamples = None
    device: Device = "cpu"


@dataclass(frozen=True)
class HowBNHelps:
    """The experiment of "How does batch normalization help optimization?", and its size.

    Attributes:
        model: vgg on CIFAR-10, or dln, the deep linear network.
        data: CIFAR-10, a Hugging Face name or a local folder; for the VGG.
        scale: Fraction of the paper's number of steps (15,000 and 10,000).
        width: full, or small for a VGG a quarter as wide.
        lr: Learning rate of the VGG; the paper's are 0.1 and, as recalled, 0.5.
        seed: Seed of weights and data.
        device: cpu, or a CUDA device.
    """

    model: Literal["vgg", "dln"] = "vgg"
    data: Data = "cifar10"
    scale: Fraction = 0.01
    width: Literal["full", "small"] = "small"
    lr: Number = 0.1
    seed: Seed = 0
    device: Device = "cpu"


@dataclass(frozen=True)
class DoctorConfig:
    """What is examined.

    Attributes:
        task: Your own task, FILE.py:name or package.module:name, in place of data and model.
        data: As in compare; batches of the training split are used.
        model: As in compare.
        method: Recipe that the model was trained with, see `normkit recipes`.
        checkpoint: State dict by torch.save, bare or under model or state_dict; by default the model as it is built.
        batch_size: Batch size in training.
        accumulate: Micro-batches per optimizer step in training.
        weight_decay: Weight decay in training.
        limit: Use at most this many samples.
        device: cpu, or a CUDA device.
    """

    task: OptionalPlace = None
    data: Data = "digits"
    model: Model = "digits-cnn"
    method: Method = "batch"
    checkpoint: OptionalFile = None
    batch_size: Size = 64
    accumulate: Count = 1
    weight_decay: Number = 0.0
    limit: OptionalSamples = None
    device: Device = "cpu"

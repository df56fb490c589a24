"""The papers' tables and figures as studies: one preset each, with the papers' own figures where they are known.

Every preset trains by the paper's protocol (network, optimizer, schedule, batch sizes, number of runs) in one of two arms. In the
fair one each method gets a learning rate of its own, picked on a validation split from a grid of the same size. In the
paper's the rates are fixed, where they are known; they were not always like for like.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evenkeel.study.plan import StudyConfig, slots

CIFAR_TRAIN, SVHN_TRAIN = 50_000, 73_257
SMALLEST_BUDGET, SMALLEST_LIMIT = 512, 1000


@dataclass(frozen=True)
class Row:
    """One comparison of a table.

    Attributes:
        label: What the paper calls it.
        config: The study at the paper's size.
        published: Method -> test accuracy in percent, as published, at the row's only batch size.
        rates: Method -> the paper's learning rate; empty where none is known.
    """

    label: str
    config: StudyConfig
    published: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """One table or figure of a paper.

    Attributes:
        summary: What it shows.
        paper: Authors, year, arXiv number.
        rows: Its comparisons.
        note: What a reader must know beside the figures.
    """

    summary: str
    paper: str
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def runs(self) -> int:
        """Training runs at the paper's size, searches for learning rates included."""
        return sum(len(slots(row.config)) for row in self.rows)

    @property
    def examples(self) -> int:
        """Training examples seen by all of them together."""
        return sum(len(slots(row.config)) * row.config.budget for row in self.rows)

    def at_paper_rates(self) -> "Preset | None":
        """The same with the paper's learning rates in place of the search; None where they are not known."""
        if not all(row.rates for row in self.rows):
            return None
        return replace(
            self, rows=tuple(replace(row, config=replace(row.config, lr=dict(row.rates))) for row in self.rows)
        )

    def on(self, model: str) -> "Preset | None":
        """The same on one network: the rows that have it, or, where all rows share one network, that one in its place.

        None where neither is possible. Published figures are kept for the paper's own networks only.
        """
        kept = tuple(row for row in self.rows if model in {row.config.model, row.label})
        if kept or len({row.config.model for row in self.rows}) > 1:
            return replace(self, rows=kept) if kept else None
        return replace(
            self,
            rows=tuple(
                Row(row.label.replace(row.config.model, model), replace(row.config, model=model), rates=row.rates)
                for row in self.rows
            ),
        )


RIEMANNIAN = "Cho, Lee 2017, arXiv 1709.09603"
REVISITED = "Davis, Frank 2021, arXiv 2110.13989"
BATCHLESS = "Berger, Uc Cetina 2022, arXiv 2212.14729"
BNP = "Lange, Helfrich, Ye 2022, arXiv 2108.01110"
SANTURKAR = "Santurkar et al. 2018, arXiv 1805.11604"


def _riemannian(data: str, models: Mapping[str, tuple[float, float, float]]) -> tuple[Row, ...]:
    svhn = data.startswith("svhn")
    common: dict[str, Any] = {
        "data": data,
        "methods": ("batch", "sgd-g", "adam-g"),
        "batch_sizes": (128,),
        "seeds": 5,
        "budget": 160 * SVHN_TRAIN if svhn else 200 * CIFAR_TRAIN,
        "optimizer": "nesterov",
        "weight_decay": 5e-4,
        "schedule": "two-step" if svhn else "step",
        "warm_up": 0.0,
        "validation": 0.1,
        "flip": not svhn,
        "crop": 4,
    }
    if data == "cifar100":
        common["label_column"] = "fine_label"
    drop = "0.4" if svhn else "0.3"
    rates = {"batch": 0.1, "sgd-g": 0.2, "adam-g": 0.05}
    if svhn:
        rates = {"batch": 0.01, "sgd-g": 0.02, "adam-g": 0.005}
    return tuple(
        Row(
            model,
            StudyConfig(model=f"{model}-{drop}" if model.startswith("wrn") else model, **common),
            {name: round(100 - error, 2) for name, error in zip(("batch", "sgd-g", "adam-g"), errors, strict=True)},
            rates,
        )
        for model, errors in models.items()
    )


_MEDIAN = (
    "The paper gives the median of five runs on the whole training split; here a tenth of it validates. On the sphere are the "
    "weights that are scale-invariant, not every convolution with fewer filters than fan-in."
)


def _revisited(*methods: str) -> tuple[Row, ...]:
    config = StudyConfig(
        data="cifar10",
        model="resnet18",
        methods=methods,
        batch_sizes=(128,),
        seeds=15,
        budget=180 * 45_000,
        weight_decay=1e-4,
        warm_up=0.0,
        flip=True,
        validation=0.1,
        best_weights=True,
        alternative="greater",
    )
    return (Row("resnet18", config, rates=dict.fromkeys(methods, 0.1)),)


_VALIDATED = (
    "No result figures of the paper are known here. Every run is validated after each epoch on 5,000 of the 50,000 training "
    "images and judged at its best; that costs about 4 % of a run's arithmetic."
)
_PROBES = ("none", "batch", "noisy-batch", "l1", "l2", "linf")
_BNP = StudyConfig(
    data="cifar10",
    model="cnn5",
    methods=("none", "group", "batch", "bnp"),
    batch_sizes=(128, 16, 2, 1),
    budget=20 * CIFAR_TRAIN,
)
_BATCHLESS = StudyConfig(
    data="cifar10",
    model="batchless-cnn",
    methods=("none", "batch", "batchless-adam"),
    batch_sizes=tuple(2**i for i in range(11)),
    budget=60 * CIFAR_TRAIN,
    optimizer="adam",
    schedule="constant",
    warm_up=0.0,
)

PRESETS: dict[str, Preset] = {
    "riemannian-cifar10": Preset(
        "SGD-G and Adam-G against SGD on CIFAR-10",
        RIEMANNIAN,
        _riemannian(
            "cifar10",
            {
                "vgg13": (5.88, 5.87, 6.05),
                "vgg19": (6.49, 5.92, 6.02),
                "wrn-28-10": (3.89, 3.85, 3.78),
                "wrn-40-10": (3.72, 3.72, 3.80),
            },
        ),
        _MEDIAN + " Its SGD had ten times the Euclidean learning rate of SGD-G, and decayed the norms' parameters.",
    ),
    "riemannian-cifar100": Preset(
        "The same on CIFAR-100",
        RIEMANNIAN,
        _riemannian(
            "cifar100",
            {
                "vgg13": (26.17, 25.29, 24.89),
                "vgg19": (27.62, 25.79, 25.59),
                "wrn-28-10": (18.66, 18.19, 18.30),
                "wrn-40-10": (18.39, 18.04, 17.85),
            },
        ),
        _MEDIAN,
    ),
    "riemannian-svhn": Preset(
        "The same on SVHN",
        RIEMANNIAN,
        _riemannian(
            "svhn@cropped_digits",
            {
                "vgg13": (1.78, 1.74, 1.72),
                "vgg19": (1.94, 1.81, 1.77),
                "wrn-16-4": (1.64, 1.67, 1.61),
                "wrn-22-8": (1.64, 1.63, 1.55),
            },
        ),
        _MEDIAN,
    ),
    "revisited-cifar10": Preset(
        "A small initial scale of batch normalization: is it better, by a one-sided paired test over 15 seeds",
        REVISITED,
        _revisited("batch", "revisited"),
        _VALIDATED,
    ),
    "revisited-input": Preset(
        "Online input normalization, with the first convolution normalised",
        REVISITED,
        _revisited("batch", "revisited", "revisited+input"),
        _VALIDATED,
    ),
    "revisited-pieces": Preset(
        "The pieces of the recipe, each alone",
        REVISITED,
        _revisited(
            *("batch", "revisited", "revisited-logit-scale", "revisited-shift-lr", "revisited-both"),
            *("revisited-scale-lr", "revisited-decay", "zero-gamma"),
        ),
        "An ablation of ours, not the paper's, by its protocol.",
    ),
    "how-bn-helps-accuracy": Preset(
        "VGG with and without batch normalization, and with l_p and noisy normalization",
        SANTURKAR,
        tuple(
            Row(
                "vgg13" + (", augmented" if augmented else ""),
                StudyConfig(
                    data="cifar10",
                    model="vgg13",
                    methods=_PROBES,
                    batch_sizes=(128,),
                    budget=15_000 * 128,
                    momentum=0.0,
                    schedule="constant",
                    warm_up=0.0,
                    flip=augmented,
                    crop=4 if augmented else 0,
                    validation=0.1,
                ),
                {"batch": 92.0, "none": 88.0} if augmented else {"batch": 83.0, "none": 80.0},
                dict.fromkeys(_PROBES, 0.1),
            )
            for augmented in (False, True)
        ),
    ),
    "batchless-spiral": Preset(
        "Three-arm spiral over batch sizes 1 to 64",
        BATCHLESS,
        (
            Row(
                "spiral-mlp",
                StudyConfig(
                    data="spiral",
                    model="spiral-mlp",
                    methods=("none", "batch", "batch-renorm", "batchless-adam"),
                    batch_sizes=(1, 2, 4, 8, 16, 32, 64),
                    seeds=20,
                    budget=60_000,
                    optimizer="adam",
                    schedule="constant",
                    warm_up=0.0,
                ),
            ),
        ),
        "No result figures of the paper are known here.",
    ),
    "batchless-cifar10": Preset(
        "CIFAR-10 over batch sizes 1 to 1024",
        BATCHLESS,
        (Row("batchless-cnn", _BATCHLESS),),
        "No result figures of the paper are known here.",
    ),
    "bnp-batch-sizes": Preset(
        "Accuracy against batch size, a convolutional network without and with normalization",
        BNP,
        (Row("cnn5", _BNP),),
        "The paper's body was not available: the network and the budget are ours.",
    ),
    "bnp-mlp": Preset(
        "The fully connected network, down to batch size 1",
        BNP,
        (Row("mlp", replace(_BNP, data="digits", model="mlp", batch_sizes=(60, 8, 1), budget=20_000)),),
        "The paper's body was not available: the data and the budget are ours.",
    ),
}


def scaled(config: StudyConfig, scale: float) -> tuple[StudyConfig, list[str]]:
    """A study at a share of its size, and what was scaled down, in words.

    The budget shrinks by ``scale``; seeds and searched rates to what a first look needs; batch sizes that would make fewer than
    16 steps are left out; of each split no more is used than training and a fair evaluation need.

    Args:
        config: The study at the paper's size.
        scale: Share of the budget, in (0, 1].

    Returns:
        The study, and the changes.

    Examples:
        >>> small, changes = scaled(StudyConfig(budget=1_000_000, batch_sizes=(128, 8), seeds=15), 0.001)
        >>> small.budget, small.batch_sizes, small.seeds, changes[0]
        (1000, (8,), 2, '1,000 of 1,000,000 training examples a run')
    """
    if scale == 1:
        return config, []
    budget = min(config.budget, max(SMALLEST_BUDGET, round(config.budget * scale)))
    sizes = tuple(size for size in config.batch_sizes if 16 * size <= budget) or (min(config.batch_sizes),)
    seeds = min(config.seeds, max(2, round(config.seeds * scale)))
    limit = max(SMALLEST_LIMIT, 2 * budget)
    points = 3 if config.lr == "auto" else config.lr_points
    small = replace(config, budget=budget, batch_sizes=sizes, seeds=seeds, lr_points=points, limit=limit)
    changes = [
        f"{budget:,} of {config.budget:,} training examples a run",
        f"{seeds} of {config.seeds} seeds",
        f"at most {limit:,} examples of each split",
    ]
    if points != config.lr_points:
        changes.insert(2, f"{points} of {config.lr_points} learning rates")
    if sizes != config.batch_sizes:
        changes.append(f"batch sizes {', '.join(map(str, sizes))} of {', '.join(map(str, config.batch_sizes))}")
    return small, changes

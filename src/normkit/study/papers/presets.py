"""The papers' tables and figures as studies: one preset each, with the papers' own figures where they are known."""

from collections.abc import Mapping
from dataclasses import replace

from normkit.study.config import StudyConfig
from normkit.study.papers.scaling import Comparison, Preset

CIFAR_TRAIN, SVHN_TRAIN = 50_000, 73_257

RIEMANNIAN = "Cho, Lee 2017, arXiv 1709.09603"
REVISITED = "Davis, Frank 2021, arXiv 2110.13989"
BATCHLESS = "Berger, Uc Cetina 2022, arXiv 2212.14729"
BNP = "Lange, Helfrich, Ye 2022, arXiv 2108.01110"
SANTURKAR = "Santurkar et al. 2018, arXiv 1805.11604"


def _riemannian(summary: str, data: str, errors: Mapping[str, tuple[float, float, float]]) -> Preset:
    """A column of the paper's table: ``errors`` are those of SGD, SGD-G and Adam-G in percent, by network."""
    svhn = data.startswith("svhn")
    config = StudyConfig(
        data=data,
        methods=("revisited-decay", "sgd-g", "adam-g"),
        batch_sizes=(128,),
        seeds=5,
        budget=160 * SVHN_TRAIN if svhn else 200 * CIFAR_TRAIN,
        optimizer="nesterov",
        weight_decay=5e-4,
        schedule="two-step" if svhn else "step",
        warm_up=0.0,
        validation=0.1,
        flip=not svhn,
        crop=4,
        label_column="fine_label" if data == "cifar100" else None,
    )
    rates = {"batch": 0.1, "sgd-g-paper": 0.2, "adam-g-paper": 0.05}
    if svhn:
        rates = {method: rate / 10 for method, rate in rates.items()}
    rows = []
    for name, row in errors.items():
        model = f"{name}-{0.4 if svhn else 0.3}" if name.startswith("wrn") else name  # the paper's dropout
        accuracies = [round(100 - error, 2) for error in row]
        published = dict(zip(config.methods, accuracies, strict=True)) | dict(zip(rates, accuracies, strict=True))
        rows.append(Comparison(name, replace(config, model=model), published, rates))
    return Preset(summary, RIEMANNIAN, tuple(rows), _PROTOCOLS)


_PROTOCOLS = (
    "The paper gives the median of five runs on the whole training split; here a tenth of it validates. Its protocol "
    "(--paper-rates): every convolution with fewer filters than fan-in is on the sphere, and SGD decays norms and biases too, "
    "at ten times the rate of what SGD-G leaves off the sphere. The fair one: only scale-invariant weights are on the sphere, "
    "and SGD (revisited-decay) decays what the others decay, weights alone. Images are padded by reflection and cropped, "
    "those of CIFAR flipped too."
)


def _revisited(*methods: str) -> tuple[Comparison, ...]:
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
    return (Comparison("resnet18", config, rates=dict.fromkeys(methods, 0.1)),)


_VALIDATED = (
    "No result figures of the paper are known here. Every run is validated after each epoch on 5,000 of the 50,000 training "
    "images and judged at its best; that costs about 4 % of a run's arithmetic. The cosine falls to 0 step by step, "
    "where the paper's falls to 1e-8 epoch by epoch."
)
_LOG_ALONE = "No result figures of the paper are known here. Of its forms of sigma, log, abs and inv, log is compared."
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
    "riemannian-cifar10": _riemannian(
        "SGD-G and Adam-G against SGD on CIFAR-10",
        "cifar10",
        {
            "vgg13": (5.88, 5.87, 6.05),
            "vgg19": (6.49, 5.92, 6.02),
            "wrn-28-10": (3.89, 3.85, 3.78),
            "wrn-40-10": (3.72, 3.72, 3.80),
        },
    ),
    "riemannian-cifar100": _riemannian(
        "The same on CIFAR-100",
        "cifar100",
        {
            "vgg13": (26.17, 25.29, 24.89),
            "vgg19": (27.62, 25.79, 25.59),
            "wrn-28-10": (18.66, 18.19, 18.30),
            "wrn-40-10": (18.39, 18.04, 17.85),
        },
    ),
    "riemannian-svhn": _riemannian(
        "The same on SVHN",
        "svhn@cropped_digits",
        {
            "vgg13": (1.78, 1.74, 1.72),
            "vgg19": (1.94, 1.81, 1.77),
            "wrn-16-4": (1.64, 1.67, 1.61),
            "wrn-22-8": (1.64, 1.63, 1.55),
        },
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
            Comparison(
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
        "VGG-13 with He's initialization, where the paper has Glorot's; a tenth of the training split validates. The paper's "
        "figures are those of a VGG with and without batch normalization.",
    ),
    "batchless-spiral": Preset(
        "Three-arm spiral over batch sizes 1 to 64",
        BATCHLESS,
        (
            Comparison(
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
        _LOG_ALONE,
    ),
    "batchless-cifar10": Preset(
        "CIFAR-10 over batch sizes 1 to 1024",
        BATCHLESS,
        (Comparison("batchless-cnn", _BATCHLESS),),
        _LOG_ALONE,
    ),
    "bnp-batch-sizes": Preset(
        "Accuracy against batch size, a convolutional network without and with normalization",
        BNP,
        (Comparison("cnn5", _BNP),),
        "The paper's body was not available: the network and the budget are ours.",
    ),
    "bnp-mlp": Preset(
        "The fully connected network, down to batch size 1",
        BNP,
        (Comparison("mlp", replace(_BNP, data="digits", model="mlp", batch_sizes=(60, 8, 1), budget=20_000)),),
        "The paper's body was not available: the data and the budget are ours.",
    ),
}

"""The papers' tables and figures as studies: one preset each, with the papers' own figures where they are known."""

from collections.abc import Mapping
from dataclasses import replace

from normkit.study.config import Scaling, StudyConfig
from normkit.study.papers.scaling import Comparison, Preset

CIFAR_TRAIN, SVHN_TRAIN = 50_000, 604_388  # with SVHN's extra images

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
        crop=0 if svhn else 4,
        label_column="fine_label" if data == "cifar100" else None,
        train_split="train+extra" if svhn else "train",
        scaling="unit" if svhn else "standardized",
    )
    rates = {"batch": 0.1, "sgd-g-paper": 0.2, "adam-g-paper": 0.05}
    if svhn:
        rates = {method: rate / 10 for method, rate in rates.items()}
    rows = []
    for name, row in errors.items():
        model = f"{name}-{0.4 if svhn else 0.3}" if name.startswith("wrn") else f"{name}-dense"  # the paper's dropout
        accuracies = [round(100 - error, 2) for error in row]
        published = dict(zip(config.methods, accuracies, strict=True)) | dict(zip(rates, accuracies, strict=True))
        rows.append(Comparison(name, replace(config, model=model), published, rates))
    return Preset(summary, RIEMANNIAN, tuple(rows), _PROTOCOLS + (_SVHN if svhn else _CIFAR))


_PROTOCOLS = (
    "The paper's protocol (--paper-rates): every convolution with fewer filters than fan-in is on the sphere, weight "
    "decay is a part of the gradient and goes through the momentum, and SGD decays norms and biases too, at a "
    "learning rate ten times that of the weights that SGD-G leaves off the sphere. The fair protocol: only "
    "scale-invariant weights are on the sphere, every method has its own rate, and SGD (revisited-decay) decays "
    "weights alone, as the others do. Departures: a tenth of the training split is held out, where the paper trains "
    "on all of it; we report the mean of five runs, the paper their median; weights start from He's normal "
    "distribution. "
)
_CIFAR = (
    "Images are padded by reflection, cropped, flipped and standardized per channel; the paper's standardization is "
    "not known here."
)
_SVHN = (
    "Images are prepared as in the authors' code: 604,388 of train and extra, divided by 255, neither cropped nor "
    "flipped."
)


def _revisited(*methods: str, label: str = "resnet18", scaling: Scaling = "standardized") -> Comparison:
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
        scaling=scaling,
    )
    return Comparison(label, config, rates=dict.fromkeys(methods, 0.1))


_VALIDATED = (
    "No result figures of the paper are known here. The reference is batch normalization without decay of scale, "
    "shift and biases (revisited-decay), since the authors' baseline has the same parameter groups. Every run is "
    "validated after each epoch on 5,000 of the 50,000 training images, and its best weights are tested; this costs "
    "about 4 % of a run's arithmetic. Departures: the cosine falls to 0 step by step, the paper's to 1e-8 epoch by "
    "epoch; convolutions start from He's normal distribution by fan-in, the classifier uniformly by fan-in as the "
    "authors'; running variances behind another normalization start at the square of the initial scale."
)
_SWEPT = ("revisited-decay", "revisited")
_SCALES = tuple(f"revisited:scale={scale}" for scale in (0.01, 0.03, 0.3, 1.0))
_DIVISORS = tuple(f"revisited:scale_lr_divisor={divisor}" for divisor in (1, 10, 1000))
_LOG_ALONE = (
    "No result figures of the paper are known here. Of its three forms of sigma (log, abs, inv), log is compared."
)
_PROBES = ("none", "batch", "noisy-batch", "l1", "l2", "linf")
_BNP = StudyConfig(
    data="cifar10",
    model="cnn5",
    methods=("none", "group", "batch", "bnp"),
    batch_sizes=(128, 16, 2, 1),
    budget=20 * CIFAR_TRAIN,
)
_DEEP = replace(
    _BNP,
    model="resnet110",
    methods=("batch", "group", "bnp", "group+bnp"),
    batch_sizes=(128,),
    budget=164 * CIFAR_TRAIN,
    weight_decay=1e-4,
    schedule="two-step",
    warm_up=0.01,
    flip=True,
    crop=4,
    validation=0.1,
)
_BATCHLESS = StudyConfig(
    data="cifar10",
    model="batchless-cnn",
    methods=("none", "batch+input", *(f"batchless-adam:scale={scale}:samples=1000" for scale in ("log", "abs", "inv"))),
    batch_sizes=tuple(2**i for i in range(11)),
    budget=60 * CIFAR_TRAIN * 4 // 5,
    optimizer="adam",
    schedule="constant",
    warm_up=0.0,
    best_weights=True,
    scaling="symmetric",
)
_VGG = StudyConfig(
    data="cifar10",
    model="vgg13",
    methods=_PROBES,
    batch_sizes=(128,),
    budget=15_000 * 128,
    momentum=0.0,
    schedule="constant",
    warm_up=0.0,
    validation=0.1,
)
_VGG_NOTE = (
    "VGG-13 has no hidden dense layers and starts from He's initialization, the paper's from Glorot's; a tenth of "
    "the training split is held out. The paper's figures are those of a VGG with and without batch normalization. "
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
        "A small initial scale of batch normalization against the usual one, by a one-sided paired test over 15 seeds",
        REVISITED,
        (_revisited("revisited-decay", "revisited"),),
        _VALIDATED,
    ),
    "revisited-input": Preset(
        "Online input normalization, alone and with the small scale; inputs standardized, scaled to [-1, 1], unscaled",
        REVISITED,
        (
            _revisited("revisited-decay", "batch+input", "revisited", "revisited+input", label="resnet18, offline"),
            _revisited("revisited-decay", "revisited", label="resnet18, fixed", scaling="symmetric"),
            _revisited("revisited-decay", "revisited", label="resnet18, none", scaling="unit"),
        ),
        _VALIDATED
        + " The online normalization follows the offline one here and removes the same statistics again: its "
        "outputs are those for inputs in [0, 1], except for eps.",
    ),
    "revisited-pieces": Preset(
        "The pieces of the recipe, each alone",
        REVISITED,
        (
            _revisited(
                *("revisited-decay", "revisited", "revisited-logit-scale", "revisited-shift-lr", "revisited-both"),
                *("revisited-scale-lr", "batch+input", "zero-gamma"),
            ),
        ),
        "This ablation is ours and follows the paper's protocol; zero-gamma decays norms and biases too. " + _VALIDATED,
    ),
    "revisited-sweep": Preset(
        "Initial scales 0.01 to 1 at c = 100, and divisors c 1 to 1000 of gamma's learning rate at scale 0.1",
        REVISITED,
        (
            _revisited(*_SWEPT, *_SCALES, label="resnet18, initial scale"),
            _revisited(*_SWEPT, *_DIVISORS, label="resnet18, divisor c"),
        ),
        "The values are ours, around the paper's choice of 0.1 and 100 (revisited). " + _VALIDATED,
    ),
    "how-bn-helps-accuracy": Preset(
        "VGG with and without batch normalization, and with l_p and noisy normalization",
        SANTURKAR,
        tuple(
            Comparison(
                "vgg13" + (", augmented" if augmented else ""),
                replace(_VGG, flip=augmented, crop=4 if augmented else 0),
                {"batch": 92.0, "none": 88.0} if augmented else {"batch": 83.0, "none": 80.0},
                dict.fromkeys(_PROBES, 0.1),
            )
            for augmented in (False, True)
        ),
        _VGG_NOTE + "The paper's augmentation is not known here: ours flips, and crops after padding by 4.",
    ),
    "how-bn-helps-rates": Preset(
        "VGG with and without batch normalization at the two learning rates of the figures",
        SANTURKAR,
        tuple(
            Comparison(
                f"vgg13, rate {lr}", replace(_VGG, methods=("none", "batch"), lr=lr), rates={"none": lr, "batch": lr}
            )
            for lr in (0.1, 0.5)
        ),
        _VGG_NOTE
        + "The rates are those of the paper's figures, 0.1 and, as recalled, 0.5; neither arm searches a rate.",
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
        "CIFAR-10 over batch sizes 1 to 1024, with sigma as log, abs and inv",
        BATCHLESS,
        (Comparison("batchless-cnn", _BATCHLESS, rates=dict.fromkeys(_BATCHLESS.methods, 1e-3)),),
        "No result figures of the paper are known here. As in the author's code: norm and dropout behind both "
        "hidden dense layers, inputs in [-1, 1], statistics from 1,000 samples, Adam at Keras's default rate of "
        "1e-3 (--paper-rates), 60 epochs, the best of them chosen on a fifth of the training split. At batch size 1 "
        "batch normalization cannot normalize dense layers and is refused, where the author skips it. Departures: "
        "that fifth is drawn at random with classes in proportion, the author's is the last; the batch "
        "normalization arm has InputNorm at its input (scale 0.58, no shift, statistics of all samples so far), the "
        "author's BatchNorm; the batchless layers add BatchNorm's eps of 1e-3 to the variance and average the "
        "likelihood per channel, the author's over channels too; Adam's eps is 1e-8, Keras's 1e-7.",
    ),
    "bnp-batch-sizes": Preset(
        "Accuracy against batch size, a convolutional network without and with normalization",
        BNP,
        (Comparison("cnn5", _BNP),),
        "The paper's body was not available: the network and the budget are ours.",
    ),
    "bnp-resnet110": Preset(
        "ResNet-110 with group normalization and preconditioning (group+bnp), BNP's form for ResNets",
        BNP,
        (Comparison("resnet110", _DEEP),),
        "The paper's body was not available: this network and this combination are recalled, its figures are not "
        "known. Epochs (164), decay, crop and flip are those of the network's authors, arXiv 1512.03385. "
        "Departures: the rate falls tenfold at 37.5 and 75 % of the run, theirs at 50 and 75 %; images are padded "
        "by reflection, theirs by zeros; a tenth of the training split is held out.",
    ),
    "bnp-mlp": Preset(
        "The fully connected network, down to batch size 1",
        BNP,
        (Comparison("mlp", replace(_BNP, data="digits", model="mlp", batch_sizes=(60, 8, 1), budget=20_000)),),
        "The paper's body was not available: the data and the budget are ours.",
    ),
}

"""The networks have the papers' sizes, take what they say, and refuse the rest by name."""

import json

import pytest
import torch
from torch import fx, nn

from normkit.study.models import build_model, model_names

IMAGE = (3, 32, 32)


def parameter_count(name, input_shape=IMAGE, classes=10):
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(name, input_shape=input_shape, classes=classes).parameters())


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        ("resnet20", 0.27, 2),  # He et al. 2015, table 6
        ("resnet56", 0.85, 2),
        ("resnet110", 1.7, 1),
        ("wrn-40-10", 55.8, 1),  # Zagoruyko, Komodakis 2016
        ("wrn-28-10", 36.5, 1),
        ("wrn-16-4", 2.7, 1),
        ("wrn-22-8", 17.2, 1),
    ],
)
def test_parameter_count_is_the_papers(name, millions, digits):
    assert round(parameter_count(name) / 1e6, digits) == millions


def convolution(inputs, outputs, kernel=3):
    return inputs * outputs * kernel * kernel + 2 * outputs  # with the scale and shift of its norm


def test_parameter_count_of_imagenet_resnet_with_small_stem():
    # 11,689,512 of the ImageNet ResNet-18, with a 3x3 stem for its 7x7 one and 10 for 1,000 classes.
    assert parameter_count("resnet18") == 11_689_512 - 64 * 3 * (49 - 9) - 990 * 513
    assert parameter_count("resnet34") == 21_797_672 - 64 * 3 * (49 - 9) - 990 * 513
    assert parameter_count("resnet50") == 25_557_032 - 64 * 3 * (49 - 9) - 990 * 2049
    assert parameter_count("resnet50-imagenet", (3, 224, 224), classes=1000) == 25_557_032


@pytest.mark.parametrize(("name", "repeats"), [("vgg13", (2, 2, 2, 2, 2)), ("vgg19", (2, 2, 4, 4, 4))])
def test_parameter_count_of_vgg(name, repeats):
    expected, inputs = 5130, 3
    for width, count in zip((64, 128, 256, 512, 512), repeats, strict=True):
        expected += convolution(inputs, width) + (count - 1) * convolution(width, width)
        inputs = width
    assert parameter_count(name) == expected


@pytest.mark.parametrize(("name", "count"), [("vgg13-dense", 9_935_434), ("vgg19-dense", 20_554_826)])
def test_the_vgg_of_cho_and_lee_has_their_parameters(name, count):
    with torch.device("meta"):
        model = build_model(name, input_shape=IMAGE, classes=10)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert not any(norm.weight.requires_grad for norm in norms)
    assert [type(m) for m in model[-7:]] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]


def test_the_classifier_of_the_revisited_papers_network_is_initialized_as_its_authors_have_it():
    torch.manual_seed(0)
    classifier = build_model("resnet18", input_shape=IMAGE, classes=1000)[-1]
    bound = classifier.in_features**-0.5  # uniform by fan-in: sd 0.026 at 512 features
    for tensor in (classifier.weight, classifier.bias):
        assert tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(0.0255, rel=0.05)


def test_deep_linear_network_is_25_square_layers():
    linear = [m for m in build_model("dln", input_shape=(10,), classes=10).modules() if isinstance(m, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(10, 10)] * 25
    assert not any(layer.bias is not None for layer in linear)


def test_the_networks_of_the_batchless_paper_are_as_its_experiments_name_them():
    spiral = list(build_model("spiral-mlp", input_shape=(2,), classes=3))
    assert [layer.out_features for layer in spiral if isinstance(layer, nn.Linear)] == [50, *[40] * 20, 3]
    assert [type(layer) for layer in spiral[1:4]] == [nn.Linear, nn.LeakyReLU, nn.BatchNorm1d]
    cnn = list(build_model("batchless-cnn", input_shape=IMAGE, classes=10))
    assert [layer.kernel_size for layer in cnn if isinstance(layer, nn.Conv2d)] == [(7, 7), (5, 5), (3, 3)]
    assert {layer.out_channels for layer in cnn if isinstance(layer, nn.Conv2d)} == {64}
    assert [type(layer) for layer in cnn[1:5]] == [nn.LeakyReLU, nn.BatchNorm2d, nn.Dropout, nn.MaxPool2d]
    assert {layer.p for layer in cnn if isinstance(layer, nn.Dropout)} == {0.25}
    assert [layer.out_features for layer in cnn if isinstance(layer, nn.Linear)] == [50, 50, 10]
    dense = [nn.Linear, nn.LeakyReLU, nn.BatchNorm1d, nn.Dropout]
    assert [type(layer) for layer in cnn[16:]] == [*dense, *dense, nn.Linear]
    norms = [layer for layer in cnn if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(1e-3, 0.01)] * 5


SMALL = {
    "digits-cnn": (1, 8, 8),
    "cnn4": IMAGE,
    "cnn5": IMAGE,
    "batchless-cnn": IMAGE,
    "vgg13": IMAGE,
    "vgg19": (1, 28, 28),
    "vgg13-dense": IMAGE,
    "vgg19-dense": (1, 28, 28),
    "vgg13-small": IMAGE,
    "vgg19-small": IMAGE,
    "resnet18": (3, 8, 8),
    "resnet20": (1, 8, 8),
    "resnet34": (3, 8, 8),
    "resnet50": (3, 8, 8),
    "resnet18-imagenet": (3, 32, 32),
    "resnet34-imagenet": (3, 32, 32),
    "resnet50-imagenet": (3, 33, 33),
    "resnet56": (3, 8, 8),
    "resnet110": (3, 8, 8),
    "wrn-10-1": (3, 8, 8),
    "wrn-16-2-0.3": (3, 8, 8),
    "mlp": (1, 8, 8),
    "dln": (10,),
    "spiral-mlp": (2,),
}


def test_every_named_model_is_in_the_table_of_this_test():
    assert {name for name in model_names() if name not in {"wrn-D-K", "hf:NAME", "package.module:factory"}} == {
        name for name in SMALL if not name.startswith("wrn")
    }


@pytest.mark.parametrize("name", SMALL)
def test_model_trains_one_step_has_batchnorm_and_traces(name):
    torch.manual_seed(0)
    model = build_model(name, input_shape=SMALL[name], classes=4)
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    x = torch.randn(3, *SMALL[name])
    out = model(x)
    assert out.shape == (3, 4)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


def test_same_seed_gives_the_same_weights():
    def draw():
        torch.manual_seed(7)
        return build_model("digits-cnn", input_shape=(1, 8, 8), classes=10).state_dict()

    first, second = draw(), draw()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_he_initialisation_keeps_the_scale_of_activations_without_norm():
    torch.manual_seed(0)
    model = build_model("vgg13", input_shape=IMAGE, classes=10)
    plain = nn.Sequential(*(m for m in model if not isinstance(m, nn.BatchNorm2d | nn.MaxPool2d)))[:-3]
    out = plain(torch.randn(1, 3, 16, 16))
    assert 0.3 < out.square().mean().sqrt() < 3


@pytest.mark.parametrize(
    ("name", "input_shape", "classes", "message"),
    [
        ("resnet21", IMAGE, 10, "unknown model 'resnet21'; did you mean 'resnet20'"),
        ("digit-cnn", IMAGE, 10, "did you mean 'digits-cnn'"),
        ("wrn-28-1O", IMAGE, 10, "did you mean 'wrn-28-10'"),
        ("wrn-27-10", IMAGE, 10, "wrn-27-10: the depth of a wide ResNet is 6 n"),
        ("resnet20", (64,), 10, r"'resnet20' takes images \(channels, height, width\), got input shape \(64,\)"),
        ("vgg13", (1, 8, 8), 10, r"'vgg13' halves the map too often for input shape \(1, 8, 8\).*at least 17"),
        ("mlp", (64,), 0, "classes=0"),
        ("mlp", (), 10, r"input_shape=\(\)"),
    ],
)
def test_bad_request_names_the_value_and_the_remedy(name, input_shape, classes, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, input_shape=input_shape, classes=classes)


def test_transformers_model_from_its_configuration_classifies_small_images():
    pytest.importorskip("transformers", reason="transformers is an extra")
    torch.manual_seed(0)
    model = build_model("hf:resnet", input_shape=(1, 32, 32), classes=7).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_unknown_transformers_model_is_refused_in_one_line():
    pytest.importorskip("transformers", reason="transformers is an extra")
    for name in ("hf:no-such-model", "hf:bert-generation"):
        with pytest.raises(ValueError, match=f"model '{name}' cannot be built by transformers") as error:
            build_model(name, input_shape=IMAGE, classes=7)
        assert "\n" not in str(error.value)


def test_a_transformers_model_with_code_of_its_own_is_refused_and_its_code_is_not_run(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is an extra")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    folder = tmp_path / "model"
    folder.mkdir()
    classes = {"AutoConfig": "own.Own", "AutoModelForImageClassification": "own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ValueError, match="cannot be built by transformers"):
        build_model(f"hf:{folder}", input_shape=IMAGE, classes=7)
    assert not (tmp_path / "run").exists()

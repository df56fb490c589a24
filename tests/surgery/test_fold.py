import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import normkit
from normkit.inspection.record import record
from normkit.methods.filter_response import FilterResponseNorm2d, ThresholdedLinearUnit
from normkit.methods.online import OnlineNorm2d


def randomized(model):
    """Statistics and affine parameters as after training, float64 for comparisons to the last digit."""
    torch.manual_seed(1)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if isinstance(module, (nn.modules.batchnorm._NormBase, normkit.InputNorm)) and tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.3, 2.0)
    return model.double().eval()


def check(model, x, left=()):
    """Fold, compare with the model, and return the copy; ``left``: what the warning must name."""
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = normkit.fold(model)
    message = " ".join(str(w.message) for w in caught)
    assert all(words in message for words in left), message
    assert bool(caught) == bool(left), message
    assert not folded.training
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return folded


CONVS = [
    (nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), (5, 6)),
    (nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), (5, 6, 7)),
    (nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4), (2, 6, 5, 5)),
    (nn.Conv3d(6, 4, 3, stride=2), nn.BatchNorm3d(4, affine=False), (2, 6, 5, 5, 5)),
    (nn.ConvTranspose1d(6, 4, 3, bias=False), nn.BatchNorm1d(4), (2, 6, 5)),
    (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2), nn.BatchNorm2d(4), (2, 6, 5, 5)),
    (nn.ConvTranspose3d(6, 4, 2, groups=2, bias=False), nn.BatchNorm3d(4), (2, 6, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), CONVS)
def test_a_norm_behind_a_linear_or_convolutional_layer_is_folded_exactly(layer, norm, shape):
    model = randomized(nn.Sequential(layer, norm, nn.ReLU()))
    folded = check(model, torch.randn(shape).double())
    assert type(folded[1]) is nn.Identity


@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (nn.BatchNorm1d(6), nn.Linear(6, 4), (5, 6)),
        (nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3, bias=False), (5, 6, 7)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding="valid"), (2, 6, 5, 5)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, padding="same"), (2, 6, 5, 5)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 5, 5)),
        (normkit.InputNorm(6), nn.Conv2d(6, 4, 3), (2, 6, 5, 5)),
        (nn.BatchNorm3d(6, affine=False), nn.Conv3d(6, 4, 2), (2, 6, 3, 3, 3)),
    ],
)
def test_a_norm_before_a_layer_that_pads_no_zeros_is_folded_exactly(norm, layer, shape):
    folded = check(randomized(nn.Sequential(norm, layer)), torch.randn(shape).double())
    assert type(folded[0]) is nn.Identity


@pytest.mark.parametrize(
    ("layers", "shape", "why"),
    [
        ([nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)], (2, 6, 5, 5), "pads with zeros, which are not normalised"),
        ([nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 3)], (2, 6, 5, 5), "takes the shift for fewer inputs"),
        ([normkit.InputNorm(6), nn.ConvTranspose2d(6, 4, 3)], (2, 6, 5, 5), "takes the shift for fewer inputs"),
        (
            [nn.Conv2d(6, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)],
            (2, 6, 5, 5),
            "no linear or convolutional layer is its only",
        ),
        (
            [nn.Conv2d(6, 4, 1), nn.GroupNorm(2, 4)],
            (2, 6, 5, 5),
            "1 (GroupNorm): it normalises by the statistics of its",
        ),
        ([nn.Conv2d(6, 4, 1), nn.InstanceNorm2d(4)], (2, 6, 5, 5), "it normalises by the statistics of its own input"),
        ([nn.Linear(6, 4), nn.LayerNorm(4)], (2, 6), "it normalises by the statistics of its own input"),
        ([nn.Linear(6, 5), nn.BatchNorm1d(3)], (2, 3, 6), "another number of channels"),
    ],
)
def test_what_cannot_be_folded_stays_and_is_named_with_the_reason(layers, shape, why):
    check(randomized(nn.Sequential(*layers)), torch.randn(shape).double(), left=[why])


def test_the_scale_alone_passes_zero_padding():
    norm = nn.BatchNorm2d(6, affine=False)
    model = randomized(nn.Sequential(norm, nn.Conv2d(6, 4, 3, padding=1)))
    norm.running_mean.zero_()
    check(model, torch.randn(2, 6, 5, 5).double())


@pytest.mark.parametrize(
    "to", ["batch", "batchless", "batchless-projected", "batch-renorm", "l1", "l2", "linf", "noisy-batch", "none"]
)
def test_every_method_that_is_affine_in_eval_folds(to):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    normkit.convert(randomized(model), to)
    folded = check(model, torch.randn(2, 3, 5, 5).double())
    assert [type(m).__module__.split(".")[0] for m in folded.modules()] == ["torch"] * 6
    assert sum(1 for _ in folded.modules() if isinstance(_, nn.Identity)) == 2


def test_tracking_instance_norm_and_frozen_batch_norm_fold():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, n):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(n) + 0.5)

        def forward(self, x):
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)

    instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    layers = [nn.Conv2d(3, 4, 3), instance, nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), FrozenBatchNorm2d(4)]
    check(randomized(nn.Sequential(*layers)), torch.randn(2, 3, 9, 9).double())


def test_a_subclass_that_computes_something_else_is_not_folded():
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), Shifted(4)))
    check(model, torch.randn(2, 3, 5, 5).double(), left=["eval output is not that of a batch normalization"])


def test_a_chain_of_norms_folds_whole():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    check(randomized(model), torch.randn(2, 3, 5, 5).double())


def test_tied_weights_come_apart_and_parametrized_ones_are_materialised():
    a, b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    b.weight = a.weight
    model = nn.Sequential(a, nn.BatchNorm2d(4), b, nn.BatchNorm2d(4), parametrizations.weight_norm(nn.Conv2d(4, 3, 1)))
    model.append(nn.BatchNorm2d(3))
    check(randomized(model), torch.randn(2, 4, 5, 5).double())


def test_hooks_are_not_folded_over():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    check(model, torch.randn(2, 3, 5, 5).double(), left=["the Conv2d before it has hooks"])


@pytest.mark.parametrize(
    "between", [nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity())]
)
def test_hooks_of_what_lies_between_are_not_folded_over(between):
    model = randomized(nn.Sequential(copy.deepcopy(between), nn.BatchNorm2d(4)))
    hooked = model[0] if len(between) == 1 else model[0][1]
    hooked.register_forward_hook(lambda module, args, output: output * 2 + 1)
    x = torch.randn(2, 3, 5, 5).double()
    check(model, x, left=["1 layer stays"])
    with pytest.warns(UserWarning, match="1 layer stays"):
        torch.testing.assert_close(normkit.fold(model, example=x)(x), model(x))


class Switched(nn.Sequential):
    def forward(self, x, raw=False, unused=False):
        y = self[0](x)
        return y if raw else self[1](y)


def test_switches_of_forward_that_take_another_path_are_named():
    check(
        randomized(Switched(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))),
        torch.randn(2, 3, 5, 5).double(),
        left=["value of raw=False"],
    )


class Block(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * width), nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(width, 2 * width, 1, stride)

    def forward(self, x):
        y = self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        return y + self.short(x)


def test_in_a_preactivation_block_the_inner_norm_folds_and_the_outer_one_is_named():
    folded = check(randomized(nn.Sequential(Block(3, 2))), torch.randn(2, 3, 8, 8).double(), left=["0.norm1"])
    assert type(folded[0].norm2) is nn.Identity


def test_single_precision_is_exact_to_1e_6():
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    )
    model, x = model.float(), torch.randn(4, 3, 9, 9)
    expected = model(x)
    assert ((normkit.fold(model)(x) - expected).abs().max() / expected.abs().max()).item() < 1e-6


class Wild(nn.Module):
    """Its loop depends on data, and between convolution and norm is a function of its own, in another module."""

    def __init__(self, tapped=False):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(2)])
        self.tapped = tapped

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if x.sum().isfinite():
                y = conv(x)
                x = norm(y).relu() + (y if self.tapped else 0)
        return {"logits": x.mean((2, 3)), "size": x.shape[0]}


def test_an_example_makes_untraceable_models_foldable():
    model, x = randomized(Wild()), torch.randn(2, 4, 5, 5).double()
    with pytest.warns(UserWarning, match="fold: 2 layers stay. norms.0"):
        normkit.fold(model)
    folded = normkit.fold(model, example={"x": x})
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x)["logits"], model(x)["logits"], rtol=1e-10, atol=1e-10)
    with pytest.warns(UserWarning, match="2 layers stay"):
        normkit.fold(randomized(Wild(tapped=True)), example=x)


def test_an_example_unmasks_a_norm_of_another_dimension():
    model = randomized(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    with pytest.raises(RuntimeError, match="the folded model differs from the model"):
        normkit.fold(model, example=torch.randn(2, 3, 5).double())


def test_recording_agrees_with_tracing_and_leaves_the_model_alone():
    model = nn.Sequential(Block(3, 1), nn.Flatten(), nn.Dropout(), nn.Linear(6 * 16, 2)).train()
    model[2].eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flow, output = record(model, [torch.randn(2, 3, 4, 4), None])
    assert output.shape == (2, 2)
    from normkit.inspection.graph import producers

    assert producers(model, flow) == producers(model) == {"0.norm2": "0.conv1"}
    assert [s.name for s in flow.steps].count("add") == 1
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    del random


def test_the_copy_has_nothing_of_this_package_and_the_model_keeps_all_of_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    normkit.convert(model, "batchless", where="1")
    normkit.convert(model, "group", where="4")
    with pytest.warns(UserWarning, match=r"4 \(GroupNorm\)"):
        folded = normkit.fold(model)
    assert type(folded[4]) is nn.GroupNorm
    assert "normkit_origin" not in vars(folded[4])
    assert not folded[4]._load_state_dict_pre_hooks
    assert type(normkit.revert(model)[4]) is nn.BatchNorm2d


@pytest.mark.parametrize("name", [name for name in normkit.recipes() if name != "zero-gamma"])  # wants a ResNet
def test_a_trained_model_of_every_recipe_folds_to_the_same_function_in_torch_alone(name):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 3),
    )  # fmt: skip
    x = torch.randn(16, 3, 8, 8)
    model, optimizer = normkit.apply(name, net, lr=0.01, batches=[x])
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = normkit.fold(model.eval())
    assert bool(caught) == (name.startswith(("group", "layer", "instance", "online", "filter-response")))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)
    own = [type(module) for module in folded.modules() if not type(module).__module__.startswith("torch.")]
    dependent = {"online": [OnlineNorm2d] * 2, "filter-response": [FilterResponseNorm2d, ThresholdedLinearUnit] * 2}
    assert own == dependent.get(name, [])  # what depends on the sample stays
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())


@pytest.fixture(scope="module")
def deployable():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, bias=False),
        nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6),
    )  # fmt: skip
    normkit.convert(randomized(model).float(), "batchless", where=["4"])
    return model, normkit.fold(model), torch.randn(2, 3, 8, 8)


def test_a_folded_model_exports_without_a_normalization(deployable):
    model, folded, x = deployable
    program = torch.export.export(folded, (x,))
    assert not any("norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_folded_model_runs_as_onnx_without_a_normalization(deployable, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (test extra)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (test extra)")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (test extra)")
    model, folded, x = deployable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(folded, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert not any("Norm" in node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)

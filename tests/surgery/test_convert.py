import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

import normkit
from normkit.inspection.norms import is_batchnorm
from normkit.methods.baselines import Removed
from normkit.methods.batchless.layer import BatchlessNorm
from normkit.methods.catalog import TARGETS as CATALOG
from normkit.surgery._convert import convert, revert
from normkit.surgery.conversion_state import origin_of


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4),
    )  # fmt: skip


def without_bias(norm):
    norm.register_parameter("bias", None)
    return norm


def trained_net():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8) * 2 + 1).square().mean().backward()
        optimizer.step()
    return model


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    if any(isinstance(layer, BatchlessNorm) for layer in model):
        normkit.attach(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


TARGETS = [name for name in CATALOG if name != "batch"]
SAME_IN_EVAL = [
    name for name in TARGETS if name not in ("none", "group", "layer", "instance", "online", "filter-response")
]


@pytest.mark.parametrize("to", TARGETS)
def test_convert_then_revert_is_the_identity_in_eval(to):
    model = trained_net().eval()
    expected, keys, layers = model(X), list(model.state_dict()), list(model)
    assert convert(model, to) is model
    assert [path for path, m in model.named_modules() if is_batchnorm(m)] == (
        ["9"] if to == "instance" else []
    )  # it is flat
    if to in SAME_IN_EVAL:
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(model(X), expected, atol=1e-2)
    assert revert(model) is model
    assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model, layers, strict=True))


@pytest.mark.parametrize("to", SAME_IN_EVAL)
def test_after_training_revert_keeps_the_function_in_eval(to):
    model = convert(trained_net(), to)
    train(model)
    expected = model.eval()(X)
    torch.testing.assert_close(revert(model)(X), expected, rtol=1e-4, atol=1e-5)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("to", [to for to in TARGETS if to not in ("none", "online", "filter-response")])
def test_state_dicts_load_both_ways(to):
    plain, converted = trained_net(), convert(small_net(), to)
    converted.load_state_dict(plain.state_dict())
    again = small_net()
    if to in ("group", "layer", "instance"):  # plain GroupNorms: what they have no use for is set aside
        assert not any("running" in key for key in converted.state_dict() if not (key[0] == "9" and to == "instance"))
        again.load_state_dict(revert(copy.deepcopy(converted)).state_dict())
    else:
        again.load_state_dict(converted.state_dict())
    assert torch.equal(again.eval()(X), plain.eval()(X))
    assert torch.equal(revert(converted).eval()(X), plain.eval()(X))


@pytest.mark.parametrize("to", SAME_IN_EVAL)
def test_a_checkpoint_trained_converted_evaluates_the_same_in_the_plain_model(to):
    model, plain = convert(trained_net(), to), small_net()
    train(model)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-5)
    again = convert(small_net(), to)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(X), model(X))


def test_what_a_model_without_its_norms_saves_misses_theirs_and_revert_is_the_remedy():
    model, plain = convert(trained_net(), "none"), small_net()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"1\.weight", "1\.bias", "1\.running_mean"'):
        plain.load_state_dict(model.state_dict())
    plain.load_state_dict(revert(copy.deepcopy(model)).state_dict())
    assert "revert(copy.deepcopy(model)).state_dict()" in str(normkit.describe(model)[0])


def test_online_normalization_saves_two_errors_more_and_revert_is_the_remedy():
    model, plain = convert(trained_net(), "online"), small_net()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"1\.error_y", "1\.error_1"'):
        plain.load_state_dict(model.state_dict())
    plain.load_state_dict(revert(copy.deepcopy(model)).state_dict())


@pytest.mark.parametrize("to", TARGETS)
def test_a_converted_model_loads_a_batch_norm_checkpoint_and_its_own(to):
    plain = trained_net()
    first, second = convert(small_net(), to), convert(small_net(), to)
    first.load_state_dict(plain.state_dict())
    expected = convert(plain, to).eval()(X)
    torch.testing.assert_close(first.eval()(X), expected, rtol=1e-5, atol=1e-6)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.eval()(X), first(X))


def test_a_converted_model_loads_a_checkpoint_of_a_model_built_with_the_target():
    native = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16))
    model = convert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)), "group")
    model.load_state_dict(native.state_dict())
    assert torch.equal(model(X), native(X))


def test_none_gives_the_layer_before_its_bias_back_or_leaves_a_bias_in_place():
    model = convert(small_net(), "none")
    assert [type(model[i]) for i in (1, 4, 5, 9)] == [Removed] * 4
    assert torch.equal(model[0].bias, torch.zeros(16))
    assert torch.equal(model[8].bias, torch.zeros(4))
    assert convert(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "none")[1].bias.shape == (3,)


def test_none_does_not_give_a_bias_to_a_layer_whose_forward_may_ignore_it():
    class Own(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight)

    model = convert(nn.Sequential(Own(3, 4, 1, bias=False), nn.BatchNorm2d(4)), "none")
    assert model[0].bias is None
    assert model[1].bias.shape == (4,)


@pytest.mark.parametrize("stand_in", ["conv", "bias layer"])
def test_a_bias_trained_in_place_of_a_norm_is_absorbed_by_its_running_mean_on_revert(stand_in):
    model = trained_net()[:2].eval()
    if stand_in == "bias layer":
        model = nn.Sequential(model[0], nn.ReLU(), model[1])
    norm, before = copy.deepcopy(model[-1]), model[:-1]
    convert(model, "none")
    with torch.no_grad():
        (model[0] if stand_in == "conv" else model[-1]).bias.fill_(3.0)
    with_bias = model(X)
    for _ in range(2):
        revert(model)
    assert model[0].bias is None
    torch.testing.assert_close(model[-1](before(X)), norm(with_bias))


def test_the_parameters_stay_the_same_objects_and_convert_is_idempotent():
    for to in TARGETS[1:]:
        model = small_net()
        parameters = list(model[1].parameters())
        layers = list(convert(model, to).modules())
        assert model[1].weight is parameters[0]
        assert model[1].bias is parameters[1]
        assert list(convert(model, to).modules()) == layers


def test_converting_on_is_as_if_reverted_first():
    model = trained_net().eval()
    expected = model(X)
    for to in ("none", "l1", "layer", "batchless", "group", "none", "batch-renorm", "none", "batch"):
        convert(model, to)
    torch.testing.assert_close(model(X), expected)
    assert type(model[1]) is nn.BatchNorm2d
    assert model[0].bias is None


def test_the_bias_before_a_batchless_layer_is_frozen_until_revert():
    model = trained_net()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for to in ("batchless", "batchless-projected", "batchless"):
        convert(model, to)
        assert not model[3].bias.requires_grad
    assert revert(model)[3].bias.requires_grad
    recipe, _ = normkit.apply("batchless", small_net(), lr=0.1)
    recipe.load_state_dict(state)
    torch.testing.assert_close(recipe.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-5)
    assert revert(recipe).state_dict().keys() == state.keys()
    model[3].bias.requires_grad_(False)
    assert not revert(convert(model, "batchless"))[3].bias.requires_grad


def test_a_layer_converted_with_other_settings_is_made_anew():
    model = convert(small_net(), "batchless")
    assert convert(model, "batchless", gradient="plain")[1].gradient == "plain"
    with pytest.raises(ValueError, match="'group' has no settings, got warmup"):
        convert(model, "group", warmup=3)


def test_one_layer_at_two_places_is_replaced_by_one_layer_at_both():
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    model.again = nn.ModuleDict({"norm": norm})
    convert(model, "group")
    assert isinstance(model[0], nn.GroupNorm)
    assert model[0] is model[2] is model.again["norm"]
    revert(model)
    assert model[0] is model[2] is model.again["norm"] is norm


def test_layers_that_a_model_also_keeps_in_plain_containers_are_exchanged_there_too():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(8)
            self.listed, self.pair, self.named = [self.norm, 3], (self.norm, None), {"a": self.norm}

        def forward(self, x):
            return self.listed[0](self.pair[0](self.named["a"](x)))

    model = convert(Listed(), "group")
    assert model.listed[0] is model.pair[0] is model.named["a"] is model.norm
    assert isinstance(model.norm, nn.GroupNorm)
    assert is_batchnorm(revert(model).listed[0])
    assert model.listed[1] == 3


def test_parameters_that_two_norms_share_stay_shared():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    model[1].weight = model[0].weight
    for to in TARGETS[1:]:
        convert(model, to)
        assert model[0].weight is model[1].weight


@pytest.mark.parametrize("to", TARGETS)
def test_device_dtype_mode_and_requires_grad_are_kept(to):
    model = small_net().double().eval()
    model[1].weight.requires_grad_(False)
    model[8].weight.requires_grad_(False)
    model[9].bias.requires_grad_(False)
    model[4].train()
    convert(model, to)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert (model[1].training, model[4].training) == (False, True)
    assert not (model[8] if to == "none" else model[9]).bias.requires_grad
    assert to == "none" or (not model[1].weight.requires_grad and model[1].bias.requires_grad)
    assert all(p.device.type == "meta" for p in convert(small_net().to("meta"), to).parameters())


@pytest.mark.parametrize("to", TARGETS)
def test_a_norm_without_tensors_takes_device_and_dtype_of_the_model(to):
    layers = [
        nn.Conv2d(3, 4, 1),
        nn.InstanceNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    ]
    assert convert(nn.Sequential(*layers).double(), to)(X.double()).dtype == torch.float64
    moved = convert(nn.Sequential(*layers).to("meta"), to)
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}


@pytest.mark.parametrize("to", TARGETS)
def test_a_model_that_moved_while_converted_is_whole_after_revert(to):
    doubled = revert(convert(trained_net(), to).double()).eval()
    assert doubled(X.double()).dtype == torch.float64
    moved = revert(convert(small_net(), to).to("meta"))
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}


def test_hooks_move_along_and_their_handles_still_remove_them():
    model, seen = small_net(), []
    handle = model[1].register_forward_hook(lambda module, *_: seen.append(type(module)))
    model[1].register_full_backward_hook(lambda module, *_: seen.append("backward"))
    convert(model, "group")(X).sum().backward()
    assert seen == [nn.GroupNorm, "backward"]
    handle.remove()
    revert(model)(X).sum().backward()
    assert seen == [nn.GroupNorm, "backward", "backward"]


@pytest.mark.parametrize("to", ["group", "none", "batchless"])
def test_converted_models_survive_deepcopy_and_saving(to, tmp_path):
    model = convert(trained_net(), to).eval()
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(X), model(X))
        plain = small_net()
        plain.load_state_dict(revert(other).state_dict())
        assert other[1].weight is not model[1]._parameters.get("weight")
        assert is_batchnorm(other[1])
        assert not is_batchnorm(model[1])


def test_where_takes_a_predicate_or_paths_and_knows_near_misses():
    model = nn.Sequential(small_net(), small_net())
    convert(model, "group", where=lambda path, layer: path.startswith("0.") and layer.affine)
    assert [type(model[i][j]).__name__ for i in (0, 1) for j in (1, 5)] == [
        "GroupNorm", "BatchNorm2d", "BatchNorm2d", "BatchNorm2d",
    ]  # fmt: skip
    convert(model, "layer", where=["1"])
    assert model[1][5].num_groups == model[1][1].num_groups == 1
    revert(model, where="1.1")
    assert is_batchnorm(model[1][1])
    assert not is_batchnorm(model[1][4])
    with pytest.raises(ValueError, match=r"no module '1\.44'; did you mean '1\.4'"):
        convert(model, "group", where=["1.44"])
    with pytest.warns(UserWarning, match="no normalization layer to convert to 'none'"):
        convert(model, "none", where=["0.0"])


@pytest.mark.parametrize("where", [nn.BatchNorm2d, nn.BatchNorm2d(3), 3, [nn.BatchNorm2d(3)]])
def test_where_of_a_wrong_type_is_named(where):
    with pytest.raises(ValueError, match=r"^where (is|holds a) "):
        convert(small_net(), "group", where=where)
    with pytest.raises(ValueError, match=r"^where (is|holds a) "):
        normkit.apply("group", small_net(), lr=0.1, where=where)


def test_models_and_optimizers_of_a_wrong_type_are_named():
    for call in (lambda m: convert(m, "group"), revert, normkit.fold):
        with pytest.raises(ValueError, match=r"model is '\[\]', of type list"):
            call([])
    with pytest.raises(ValueError, match="optimizer is 'sgd'"):
        convert(small_net(), "group", optimizer="sgd")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(8), (4, 8)),
        (nn.BatchNorm1d(8), (4, 8, 3)),
        (nn.BatchNorm3d(8), (4, 8, 3, 3, 3)),
        (nn.SyncBatchNorm(8), (4, 8, 3, 3)),
        (nn.InstanceNorm2d(8, affine=True), (4, 8, 3, 3)),
        (nn.InstanceNorm2d(8, track_running_stats=True), (4, 8, 3, 3)),
        (nn.GroupNorm(2, 8), (4, 8, 3, 3)),
        (nn.BatchNorm2d(8, track_running_stats=False), (4, 8, 3, 3)),
        (type("Own", (nn.BatchNorm2d,), {})(8), (4, 8, 3, 3)),
        (without_bias(nn.BatchNorm2d(8)), (4, 8, 3, 3)),
    ],
)
@pytest.mark.parametrize("to", [*TARGETS, "batch"])
def test_every_kind_of_channels_first_norm_converts_and_comes_back(layer, shape, to):
    layer = copy.deepcopy(layer)
    conv = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](8, 8, *[1] * (len(shape) > 2))
    model = nn.Sequential(conv, layer)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if to == "instance" and len(shape) == 2:
        with pytest.warns(UserWarning, match="cannot become 'instance'"):
            convert(model, to)
    else:
        convert(model, to)
    model(torch.randn(shape))
    model.eval()(torch.randn(shape))
    assert revert(model)[1] is layer
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state if "weight" in name)


def test_layer_norms_stay_unless_the_target_can_normalise_the_last_dimension():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.RMSNorm(4))
    layers = list(model)
    with pytest.warns(UserWarning, match="LayerNorm, RMSNorm cannot become 'group'; the model is unchanged"):
        assert list(convert(model, "group")) == layers
    convert(model, "batchless")
    assert (model[1].feature_dim, type(model[3])) == (-1, nn.RMSNorm)
    assert model(torch.randn(2, 5, 4)).shape == (2, 5, 4)
    convert(model, "none")
    assert [type(model[i]) for i in (1, 3)] == [Removed, Removed]
    assert list(revert(model)) == layers


def test_layer_norms_over_several_dimensions_stay_and_maps_of_tokens_are_normalised():
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.LayerNorm(4))
    several = model[0]
    convert(model, "batchless")
    assert model[0] is several
    assert model(torch.randn(2, 5, 3, 4)).shape == (2, 5, 3, 4)


class Rectified(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Caching(nn.BatchNorm2d):
    def forward(self, x):
        self.latest = super().forward(x)
        return self.latest, x


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Contiguous(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.contiguous())


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("to", TARGETS)
def test_a_subclass_that_computes_something_else_is_refused_and_nothing_is_changed(to):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), Rectified(8))
    layers = list(model)
    with pytest.raises(ValueError, match=r"3: Rectified computes something else than torch's layer .* `where`"):
        convert(model, to)
    assert list(model) == layers
    assert model[0].bias is None
    convert(model, to, where=["1"])
    assert model[3] is layers[3]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Softplus()),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_a_norm_whose_scale_is_computed_is_refused_and_nothing_is_changed(change):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    change(model[1])
    layers = list(model)
    for to in ("group", "frozen", "none"):
        with pytest.raises(ValueError, match=r"1: the weight of this \w+ is computed from other tensors"):
            convert(model, to)
    assert list(model) == layers


def test_what_a_subclass_computes_counts_and_not_that_it_has_a_forward():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Contiguous(8), ChannelsFirst(8))
    convert(model, "none", where=["1"])
    assert type(model[1]) is Removed
    with pytest.raises(ValueError, match="2: ChannelsFirst computes something else"):
        convert(model, "none", where=["2"])
    model = nn.Sequential(Caching(3))
    for _ in range(2):  # the second time it holds what cannot be copied
        with pytest.raises(ValueError, match="0: Caching computes something else"):
            convert(model, "none")
        model(torch.randn(2, 3, 4, 4))


def test_a_removed_norm_without_parameters_leaves_its_input_alone():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid())
    model.append(Residual(nn.InstanceNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)))
    convert(model, "none")
    assert model[2][0].bias.shape == (8,)
    model(torch.randn(2, 3, 6, 6)).sum().backward()


def test_a_group_norm_whose_dimensions_are_unknown_is_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8))
    with pytest.raises(ValueError, match="2: cannot tell whether this GroupNorm sees sequences, images or volumes"):
        convert(model, "batchless")
    assert type(model[0]) is nn.BatchNorm2d


def test_a_lazy_norm_is_refused_before_its_first_batch_and_converted_after():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="1: LazyBatchNorm2d does not know its features yet; run one batch"):
        convert(model, "group")
    assert type(model[0]) is nn.BatchNorm2d
    model(X)
    assert isinstance(convert(model, "group")[1], nn.GroupNorm)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(
    ("layer", "target"), [(nn.LazyConv2d(4, 3), "batchless"), (nn.LazyConv2d(4, 3, bias=False), "none")]
)
def test_a_lazy_layer_whose_bias_would_change_is_refused_before_its_first_batch(layer, target):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), layer, nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="3: the LazyConv2d before it does not know its features yet; run one batch"):
        convert(model, target)
    assert type(model[1]) is type(model[3]) is nn.BatchNorm2d
    assert model[0].bias.requires_grad


def test_a_wrapped_or_sharded_model_is_refused_with_the_remedy(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(small_net())
        for change in (lambda: convert(wrapped, "group"), lambda: revert(wrapped)):
            with pytest.raises(ValueError, match=r"convert the bare model first, then wrap it \(wrapped.module"):
                change()
        sharded = fully_shard(small_net(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"is sharded \(fully_shard\).*; convert the model before sharding it"):
            convert(sharded, "group")
        for to, attach in (
            ("none", lambda model, optimizer: normkit.BNP(model).attach(optimizer)),
            ("batchless", normkit.attach),
        ):
            model = fully_shard(convert(small_net(), to), mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ValueError, match=r"sharded over ranks \(fully_shard\).*; use DistributedDataParallel"):
                attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    finally:
        torch.distributed.destroy_process_group()


def test_unknown_targets_are_refused_with_the_list():
    with pytest.raises(ValueError, match="unknown target 'grup'; choose one of none, batch, group"):
        convert(small_net(), "grup")


def test_a_model_that_is_a_norm_itself_comes_back_replaced():
    norm = nn.BatchNorm2d(8)
    assert isinstance(group := convert(norm, "group"), nn.GroupNorm)
    assert revert(group) is norm


def test_describe_tells_what_each_layer_is_what_it_replaced_and_what_was_lost():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    convert(model, "none", where="1")
    convert(model, "group", where="2")
    assert [str(row) for row in normkit.describe(model)] == [
        "1: Removed(8) in place of BatchNorm2d, 0 has a bias instead; "
        "weight, bias and running statistics are set aside until revert and not saved: what loads where they are "
        "expected is revert(copy.deepcopy(model)).state_dict()",
        "2: GroupNorm(8) in place of BatchNorm2d; running statistics are set aside until revert and not saved",
        "3: BatchNorm2d(8)",
    ]


class TestOptimizerRepair:
    def trained(self, *, named=False):
        model = small_net()
        norms = [p for m in model if is_batchnorm(m) for p in m.parameters()]
        others = [p for p in model.parameters() if all(p is not q for q in norms)]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        if named:
            groups = [(name, p) for name, p in model.named_parameters()]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.step(model, optimizer)
        return model, optimizer

    def step(self, model, optimizer):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    def test_removed_parameters_leave_new_ones_enter_and_state_stays(self):
        model, optimizer = self.trained()
        momentum = optimizer.state[model[0].weight]["momentum_buffer"]
        gamma = model[1].weight
        convert(model, "none", optimizer=optimizer)
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
        assert any(p is model[0].bias for p in optimizer.param_groups[0]["params"])
        assert optimizer.state[model[0].weight]["momentum_buffer"] is momentum
        assert gamma not in optimizer.state
        self.step(model, optimizer)
        revert(model, optimizer=optimizer)
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
        self.step(model, optimizer)

    def test_parameters_that_live_on_keep_their_state_and_group(self):
        model, optimizer = self.trained()
        before = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
        momentum = optimizer.state[model[1].weight]["momentum_buffer"]
        convert(model, "batchless", optimizer=optimizer)
        assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == before
        assert optimizer.state[model[1].weight]["momentum_buffer"] is momentum

    def test_parameter_names_stay_in_step(self):
        model, optimizer = self.trained(named=True)
        convert(model, "none", optimizer=optimizer)
        names = {id(p): name for name, p in model.named_parameters()}
        group = optimizer.param_groups[0]
        assert [names[id(p)] for p in group["params"]] == group["param_names"]

    def test_an_optimizer_of_another_model_is_refused(self):
        model = small_net()
        with pytest.raises(ValueError, match="holds no parameter of the model"):
            convert(model, "none", optimizer=torch.optim.SGD(small_net().parameters(), lr=0.1))
        assert is_batchnorm(model[1])


def test_a_model_without_norms_gives_a_warning_and_works():
    with pytest.warns(UserWarning, match="no normalization layer"):
        model, optimizer = normkit.apply("group", nn.Linear(2, 2), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) == 2


@pytest.mark.parametrize("name", ["none", "batch", "group", "layer", "batch-renorm"])
def test_every_recipe_trains(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = normkit.apply(name, small_net(), lr=0.01)
    before = [p.clone() for p in model.parameters()]
    model(X).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bnp", {"lr": -0.1}, "lr is -0.1"),
        ("group", {"lr": 0.1, "weight_decay": float("nan")}, "weight_decay is nan"),
        ("revisited", {"lr": 0.1, "momentum": -1}, "momentum is -1"),
        ("bnp", {"lr": 0.1}, "8: another BNP observes this layer"),
        ("batchless", {"lr": 0.1, "batches": []}, "batches is empty"),
    ],
)
def test_when_a_recipe_raises_the_model_is_as_it_was(name, options, message):
    model = trained_net()
    observed = normkit.BNP(model, layers=["8"]) if "BNP" in message else None
    layers, state = list(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        normkit.apply(name, model, **options)
    assert list(model) == layers
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert observed is None or len(model[8]._forward_hooks) == 1


def test_when_the_warning_of_a_recipe_is_an_error_the_model_is_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Doubled(8, 8, 3), Doubled(8, 8, 1))
    layers = list(model)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="bnp does little here"):
                normkit.apply("bnp", model, lr=0.1)
        assert list(model) == layers
        assert not model[0]._forward_hooks


def test_a_recipe_that_converts_nothing_names_what_was_converted_before(caplog):
    model, _ = normkit.apply("group", trained_net(), lr=0.1)
    caplog.clear()
    normkit.apply("batch", model, lr=0.1)
    assert "batch: 4 normalization layers stay as they were converted before (1 to 'group', ...)" in caplog.text


@pytest.mark.parametrize("to", ["online", "batchless", "l1", "group", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_cast_while_converted_evaluates_and_comes_back_in_that_dtype(to, dtype):
    model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), to).to(dtype)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    model.train()(x)
    model.eval()(x)
    revert(model)(x)
    assert model[1].running_var.dtype == dtype


@pytest.mark.parametrize("to", TARGETS)
def test_state_dicts_from_before_the_counter_of_batches_load(to):
    old = {name: t for name, t in trained_net().state_dict().items() if not name.endswith("num_batches_tracked")}
    model = convert(small_net(), to)
    model.load_state_dict(old)
    revert(model)
    for name in ("1.weight", "1.running_var", "4.running_mean"):
        torch.testing.assert_close(model.state_dict()[name], old[name])


def test_when_a_conversion_raises_the_model_is_as_it_was():
    model = trained_net()
    layers, state = list(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="gradient='bogus'"):
        convert(model, "batchless", gradient="bogus")
    with pytest.raises(ZeroDivisionError):
        convert(model, "none", where=lambda path, layer: 1 / (path != "9"))
    assert list(model) == layers
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(origin_of(layer) for layer in model)

"""Models on the meta device, with hooked weights, scripted, or in torch.func: they work or are refused in one line."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune

import normkit
from normkit.methods.catalog import TARGETS


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))


def trained():
    torch.manual_seed(0)
    model, x = net(), torch.randn(8, 3, 6, 6) + 1
    model(x)
    return model, x


@pytest.mark.parametrize("to", TARGETS)
def test_a_model_converted_on_the_meta_device_takes_a_state_by_assignment(to):
    source, x = trained()
    with torch.device("meta"):
        model = normkit.convert(net(), to)
    state = copy.deepcopy(source.state_dict())
    model.load_state_dict(state, assign=True, strict=to != "none")
    expected = normkit.convert(source, to).eval()(x)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(model.eval()(x), expected)
    model.train()(x).sum().backward()


@pytest.mark.parametrize("to", TARGETS)
def test_a_model_converted_on_the_meta_device_takes_a_state_after_to_empty(to):
    source, x = trained()
    with torch.device("meta"):
        model = normkit.convert(net(), to)
    model.to_empty(device="cpu")
    normkit.convert(source, to)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model.eval()(x), source.eval()(x))


def weight_norm(layer):
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(layer)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize("wrap", [weight_norm, nn.utils.spectral_norm, pruned])
def test_one_layer_with_a_computed_weight_hides_no_other_layer(wrap):
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(wrap(nn.Conv2d(8, 8, 3, bias=False)), nn.BatchNorm2d(8)),
    )
    x = torch.randn(8, 3, 7, 7)
    model(x)
    assert normkit.scale_invariance(model)["0.weight"].invariant
    with pytest.warns(UserWarning, match=r"fold: 1 layer stays. 4 \(BatchNorm2d\): the Conv2d before it has hooks"):
        folded = normkit.fold(model.eval())
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_instruments_refuse_a_scripted_model_and_leave_it_as_it_was():
    model, x = trained()
    with pytest.warns(DeprecationWarning, match="deprecated"):
        scripted = torch.jit.script(model)
    before = copy.deepcopy(scripted.state_dict())
    for measure in (
        lambda: normkit.instruments.curvature(scripted, lambda m, b: m(b).sum(), x, lr=0.1),
        lambda: normkit.doctor(scripted, lambda m, b: m(b).sum(), [x] * 3),
    ):
        with pytest.raises(ValueError, match=r"the model is a scripted module.*measure the model before scripting it"):
            measure()
    assert all(torch.equal(before[k], v) for k, v in scripted.state_dict().items())


@pytest.mark.parametrize("recipe", ["batchless", "batchless-projected", "bnp", "group"])
@pytest.mark.filterwarnings("ignore:.*change the network's function")
def test_gradients_of_single_samples_work_and_count_nothing(recipe):
    source, x = trained()
    model, _ = normkit.apply(recipe, source, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    expected = [grad(loss)(parameters, sample) for sample in x]
    for name, stacked in found.items():
        torch.testing.assert_close(stacked, torch.stack([each[name] for each in expected]), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("recipe", ["sgd-g", "adam-g"])
def test_optimizers_on_the_sphere_load_any_number_of_states_pickled_or_not(recipe):
    torch.manual_seed(0)
    model, x = net(), torch.randn(8, 3, 6, 6)
    model, optimizer = normkit.apply(recipe, model, lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    for _ in range(3):
        optimizer.load_state_dict(copy.deepcopy(state))
    model(x).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())

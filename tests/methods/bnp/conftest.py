"""Fixtures that several files share."""

import pytest
import torch

from tests.methods.bnp.models import MODELS


@pytest.fixture(params=MODELS, name="setting")
def _setting(request):
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    model = make().double()
    data = [(1 + torch.randn(8, *shape, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(6)]
    return model, data

"""On a GPU, reading a device value on the host stops the stream: no method may do it in a training step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
from normkit.study.models import build_model

aten = torch.ops.aten
_WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}


class Waits(TorchDispatchMode):
    """Lists operations whose result the host must wait for, but for step counters, which live on the host anyway."""

    def __init__(self, counters: set[int]):
        super().__init__()
        self.counters = counters
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or (func in _WAITING and args[0].data_ptr() not in self.counters):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def counters(optimizer: torch.optim.Optimizer) -> set[int]:
    steps = (state["step"] for state in optimizer.state.values() if "step" in state)
    return {step.data_ptr() for step in steps if isinstance(step, torch.Tensor)}


def waits_of_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    for _ in range(2):  # the first step may set things up
        with Waits(counters(optimizer)) as waits:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return waits.seen


@pytest.mark.parametrize("name", normkit.recipes())
def test_a_training_step_reads_no_device_value(name):
    model = build_model("resnet20", input_shape=(3, 8, 8), classes=10)
    assert not waits_of_a_step(*normkit.apply(name, model, lr=0.01))


def test_waiting_is_noticed():
    class Impatient(nn.Linear):
        def forward(self, input):
            return super().forward(input.flatten(1)) * (1.0 if input.sum() > 0 else 2.0)

    model = Impatient(192, 10)
    assert waits_of_a_step(model, torch.optim.SGD(model.parameters(), lr=0.01))

"""What only a GPU can show: every recipe there against the CPU, and under what people use on GPUs."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normkit
from normkit.methods.kernels import choice
from normkit.study.models.layers import conv_norm_relu, pooled_classifier
from normkit.study.models.resnet import BasicBlock, projection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
]

RECIPES = list(normkit.recipes())
MAIN = ["batch", "bnp", "batchless", "batchless-projected", "sgd-g", "adam-g"]
STOCHASTIC = {"noisy-batch"}  # draws from each device's own random numbers
STEPS = 5
only_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's own, of which a CPU has no counterpart")


@pytest.fixture(autouse=True)
def _exact():
    """Neither TF32 nor an algorithm chosen by its speed: differences are rounding alone."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def network():
    """Plain and residual convolutions, for the recipes that need either."""
    block = BasicBlock(8, 16, 2, projection(8, 16, 2))
    return nn.Sequential(*conv_norm_relu(1, 8), *conv_norm_relu(8, 8), block, *pooled_classifier(16, 10))


class Run:
    """A small network with the method, and its steps on batches that do not depend on the device."""

    def __init__(self, recipe, device, dtype=torch.float32, *, last=False, size=8):
        generator = torch.Generator().manual_seed(0)
        self.data = [
            (
                (0.5 + torch.randn(size, 1, 8, 8, generator=generator)).to(device, dtype),
                torch.arange(size).to(device) % 10,
            )
            for _ in range(STEPS)
        ]
        torch.manual_seed(0)
        model = network().to(device, dtype)
        if last:
            model = model.to(memory_format=torch.channels_last)
        self.device = device
        self.model, self.optimizer = normkit.apply(
            recipe, model, lr=0.1 * normkit.recipes()[recipe].lr, batches=[self.data[0][0]]
        )
        self.forward = self.model

    def step(self, number=0, *, autocast=None, scaler=None):
        x, y = self.data[number]
        self.optimizer.zero_grad()
        with torch.autocast(self.device, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(self.forward(x), y)
        if scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(self.optimizer)
            scaler.update()
        return loss.detach()

    def train(self, **options):
        return torch.stack([self.step(number, **options) for number in range(STEPS)])

    def state(self):
        """All parameters and buffers in float64, on the CPU."""
        return {name: t.detach().double().cpu() for name, t in self.model.state_dict().items()}


def assert_same(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_five_steps_equal_those_on_the_cpu(recipe, dtype, tolerance, device):
    runs = Run(recipe, device, dtype), Run(recipe, "cpu", dtype)
    losses = [run.train().double().cpu() for run in runs]
    assert torch.isfinite(losses[0]).all()
    if recipe not in STOCHASTIC:
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
        assert_same(runs[0].state(), runs[1].state(), tolerance)


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - STOCHASTIC))
def test_kernels_and_readable_code_take_the_same_steps(recipe, device, monkeypatch):
    run = Run(recipe, device)
    run.train()
    monkeypatch.setattr(choice, "chosen", "0")
    readable = Run(recipe, device)
    readable.train()
    assert_same(run.state(), readable.state(), 1e-3)


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - STOCHASTIC))
def test_the_layout_of_memory_changes_nothing(recipe, device):
    runs = Run(recipe, device), Run(recipe, device, last=True)
    for run in runs:
        run.train()
    assert_same(runs[1].state(), runs[0].state(), 2e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_to_bf16_trains_as_fp32_does_up_to_its_rounding(recipe, device):
    run, exact = Run(recipe, device), Run(recipe, device)
    losses, expected = run.train(autocast=torch.bfloat16), exact.train()
    assert torch.isfinite(losses).all()
    if recipe not in STOCHASTIC:
        torch.testing.assert_close(losses[0], expected[0], rtol=0.05, atol=0.05)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@only_cuda
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_that_overflows_in_fp16_is_left_out_and_the_next_are_taken(recipe, device):
    run = Run(recipe, device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    before = run.state()
    run.step(0, autocast=torch.float16, scaler=scaler)
    assert_same({n: run.state()[n] for n in names}, {n: before[n] for n in names}, 0)
    scaler.update(2.0**8)
    losses = [run.step(number, autocast=torch.float16, scaler=scaler) for number in range(1, STEPS)]
    assert torch.isfinite(torch.stack(losses)).all()
    assert all(t.isfinite().all() for t in run.state().values())
    assert any(not torch.equal(run.state()[n], before[n]) for n in names)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that the compiler reads, and hides itself
@pytest.mark.parametrize("recipe", MAIN)
def test_compiled_steps_equal_eager_ones(recipe, device):
    torch.compiler.reset()  # graphs of one recipe serve another that differs by its hooks alone
    run, eager = Run(recipe, device), Run(recipe, device)
    run.forward = torch.compile(run.model)
    run.train()
    eager.train()
    assert_same(run.state(), eager.state(), 2e-3)


@only_cuda
@pytest.mark.parametrize("recipe", MAIN)
def test_a_step_captured_in_a_cuda_graph_replays_as_it_runs(recipe, device):
    run, eager = Run(recipe, device), Run(recipe, device)
    for group in run.optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    for number in range(1, STEPS):  # every step on the same batch: a graph reads its inputs where they lie
        run.data[number] = eager.data[number] = run.data[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    run.optimizer.zero_grad()
    with torch.cuda.graph(graph):
        F.cross_entropy(run.model(run.data[0][0]), run.data[0][1]).backward()
        run.optimizer.step()
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        eager.step()
    assert_same(run.state(), eager.state(), 1e-3)


@only_cuda
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_never_makes_the_host_wait_for_the_device(recipe, device):
    run = Run(recipe, device)
    run.step(0)
    run.step(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        run.step(3)
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense", "aten::nonzero", "DtoH")
    found = {event.key for event in profile.key_averages() if any(wait in event.key for wait in waits)}
    assert found == set()


@only_cuda
@pytest.mark.parametrize("recipe", MAIN)
def test_ddp_over_nccl_with_one_rank_equals_no_ddp(recipe, device, tmp_path):
    run, alone = Run(recipe, device), Run(recipe, device)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run.forward = DistributedDataParallel(run.model, device_ids=[torch.cuda.current_device()])
        run.train()
        alone.train()
        assert_same(run.state(), alone.state(), 1e-3)
        sums = torch.arange(4.0, dtype=torch.float64, device=device)  # as the statistics of all layers travel
        dist.all_reduce(sums)
        assert sums.tolist() == [0.0, 1.0, 2.0, 3.0]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("recipe", MAIN)
def test_a_run_resumed_on_the_other_device_goes_on(recipe, device):
    run = Run(recipe, "cpu", torch.float64)
    run.step(0)
    other = Run(recipe, device, torch.float64)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for number in (1, 2):
        run.step(number)
        other.step(number)
    assert_same(other.state(), run.state(), 1e-8)


def test_the_rehearsal_is_asked_for():
    assert torch.cuda.is_available() or os.environ["NORMKIT_GPU_TESTS"] == "cpu"

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import normkit
from normkit import convert, recalibrate
from tests.cases import rows
from tests.gloo import one_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2), nn.BatchNorm1d(2),
    ).double()  # fmt: skip


def data(n=3, size=8):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 3, 8, 8, generator=generator).double() * 2 + 1 for _ in range(n)]


def test_batch_norm_gets_the_mean_and_variance_of_all_rows_it_normalises_in_training():
    model, batches = net(), data()
    recalibrate(model, batches)
    inputs = [[], [], []]
    for batch in batches:  # float64 reference: the training forward pass, written out, without dropout
        x = model[0](batch)
        inputs[0].append(rows(x))
        x = nn.functional.batch_norm(x, None, None, model[1].weight, model[1].bias, True).relu()
        x = model[4](x)
        inputs[1].append(rows(x))
        x = nn.functional.batch_norm(x, None, None, model[5].weight, model[5].bias, True).relu()
        inputs[2].append(model[8](x.flatten(1)))
    for i, seen in zip((1, 5, 9), inputs, strict=True):
        torch.testing.assert_close(model[i].running_mean, torch.cat(seen).mean(0), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model[i].running_var, torch.cat(seen).var(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("to", ["batchless", "batchless-projected"])
def test_batchless_layers_are_fitted_one_after_the_other_whatever_the_batches(to):
    model, whole = convert(net(), to).eval(), torch.cat(data())
    recalibrate(model, whole.split(5))
    x = whole
    for layer in model:
        y = layer(x)
        if isinstance(layer, normkit.methods.batchless.layer.BatchlessNorm):
            mean, var = rows(x).mean(0), rows(x).var(0, correction=0)
            torch.testing.assert_close(layer.running_mean.data, mean, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(layer.sigma, (var + layer.eps).sqrt(), rtol=1e-10, atol=1e-10)
        x = y


def test_a_model_with_both_kinds_is_fitted_layer_after_layer():
    model, whole = convert(net(), "batchless", where="1"), torch.cat(data())
    recalibrate(model, [whole])
    x = model[:5].eval()(whole)
    torch.testing.assert_close(model[5].running_mean, rows(x).mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model[5].running_var, rows(x).var(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("to", ["batch-renorm", "noisy-batch"])
def test_relatives_of_batch_norm_get_its_statistics(to):
    plain, other = recalibrate(net(), data()), recalibrate(convert(net(), to), data())
    for i in (1, 5, 9):
        torch.testing.assert_close(other[i].running_mean, plain[i].running_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other[i].running_var, plain[i].running_var, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_l_p_layers_get_the_mean_of_all_rows_and_the_average_l_p_mean_of_the_batches(p):
    norm, (first, second, third) = normkit.LpNorm1d(3, p, dtype=torch.float64), torch.randn(3, 4, 3).double().unbind()
    batches = [first, second, torch.cat([third, third + 1])]
    recalibrate(norm, batches)
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    means = [torch.linalg.vector_norm(b, ord=p, dim=0) / len(b) ** (1 / p) for b in batches]
    torch.testing.assert_close(norm.running_mean, torch.cat(batches).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        norm.running_scale, (torch.stack(means) * sizes[:, None]).sum(0) / 16, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("to", ["l1", "l2", "linf"])
def test_an_l_p_network_evaluates_as_it_trains_after_recalibration_on_one_batch(to):
    model, (batch,) = convert(net(), to), data(1)
    recalibrate(model, [batch])
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    torch.testing.assert_close(model.eval()(batch), model.train()(batch), rtol=1e-9, atol=1e-9)


def test_statistics_of_a_revert_are_brought_up_to_date():
    model, batches = net(), data()
    expected = recalibrate(net(), batches).eval()(batches[0])
    revived = normkit.revert(convert(model, "group"))
    torch.testing.assert_close(recalibrate(revived, batches).eval()(batches[0]), expected)


@pytest.mark.parametrize("wrap", [lambda x: {"pixels": x}, lambda x: (x, None), lambda x: x])
def test_batches_may_be_mappings_pairs_or_tensors(wrap):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, pixels):
            return self.net(pixels)

    expected = recalibrate(net(), data())
    model = recalibrate(Named(), (wrap(x) for x in data()))
    torch.testing.assert_close(model.net[9].running_var, expected[9].running_var)


def test_batches_of_any_kind_work_with_a_forward():
    class Batch:
        def __init__(self, x):
            self.x = x

    model = recalibrate(net(), map(Batch, data()), forward=lambda m, batch: m(batch.x))
    torch.testing.assert_close(model[1].running_mean, recalibrate(net(), data())[1].running_mean)


@pytest.mark.parametrize("to", ["batch", "batchless"])
def test_when_a_batch_raises_modes_hooks_and_statistics_are_as_before(to):
    model = convert(net(), to)
    model[3].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        recalibrate(model, [*data(2), torch.randn(2, 5, 8, 8).double()])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    recalibrate(model, data())
    assert [m.training for m in model.modules()] == modes
    assert not torch.equal(before["1.running_mean"], model[1].running_mean)


def test_a_batch_of_one_value_per_channel_is_no_obstacle():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    x = torch.randn(6, 3)
    recalibrate(model, x.split(1))
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))
    torch.testing.assert_close(model[1].running_var, model[0](x).var(0))


def test_a_batch_that_overflows_does_not_count():
    model = recalibrate(net(), [*data(), torch.full((2, 3, 8, 8), torch.inf).double()])
    assert all(b.isfinite().all() for b in model.buffers())


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear(2, 2), [torch.zeros(2, 2)], "no normalization layer with running statistics"),
        (nn.BatchNorm1d(2), iter(()), "batches is empty"),
        (normkit.BatchlessNorm1d(2), [], "batches is empty"),
        (nn.BatchNorm1d(2), torch.zeros(4, 2), r"batches is one tensor of shape \(4, 2\); give several, or \[batch\]"),
    ],
)
def test_nothing_to_recalibrate_is_an_error_that_says_so(model, batches, message):
    with pytest.raises(ValueError, match=message):
        recalibrate(model, batches)


@one_of(2)
def _rank(rank, store, results):
    out = {}
    for to in ("batch", "batchless"):
        model = recalibrate(convert(net(), to), data(2, 6)[rank].split(3))
        out[to] = model.state_dict()
    torch.save(out, f"{results}-{rank}")


@pytest.mark.slow
def test_two_ranks_get_the_statistics_of_all_rows(tmp_path):
    mp.spawn(_rank, (tmp_path / "store", tmp_path / "out"), nprocs=2)
    both = [x for batch in data(2, 6) for x in batch.split(3)]
    for to in ("batch", "batchless"):
        expected = recalibrate(convert(net(), to), both).state_dict()
        counters = [name for name in expected if name.endswith("num_batches_tracked")]
        expected |= {name: torch.tensor(len(both) // 2) for name in counters}  # a rank counts its own batches
        for rank in (0, 1):
            state = torch.load(tmp_path / f"out-{rank}")[to]
            assert all(torch.allclose(state[name], t, rtol=1e-9) for name, t in expected.items()), (to, rank)


class FrozenBody(nn.Module):
    """Fine-tuning: the backbone stays in eval mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def forward(self, x):
        return self.head(self.body(x))

    def train(self, mode=True):
        super().train(mode)
        self.body.eval()
        return self


@pytest.mark.parametrize("to", ["batch", "batchless"])
def test_layers_frozen_in_eval_mode_keep_their_statistics(to):
    torch.manual_seed(0)
    model = convert(FrozenBody().double(), to).train()
    x = 3 * torch.randn(64, 4, dtype=torch.float64) + 2
    kept = model.body[1].running_mean.clone()
    recalibrate(model, x.split(16))
    assert torch.equal(model.body[1].running_mean, kept)
    torch.testing.assert_close(model.head[1].running_mean.data, model.head[0](model.body(x)).mean(0).detach())
    model.head.eval()
    with pytest.raises(ValueError, match=r"all normalization layers are in eval mode .*call model\.eval\(\) first"):
        recalibrate(model, x.split(16))


def test_a_cumulative_average_goes_on_from_the_recalibrated_statistics():
    torch.manual_seed(0)
    x, late = torch.randn(4, 32, 4, dtype=torch.float64) + 1, torch.randn(8, 4, dtype=torch.float64)
    for norm in (nn.BatchNorm1d(4, momentum=None).double(), convert(nn.BatchNorm1d(4).double(), "batch-renorm")):
        recalibrate(norm, list(x))
        before = norm.running_mean.clone()
        norm.train()(late)
        torch.testing.assert_close(norm.running_mean, before.lerp(late.mean(0), 1 / 5))


@pytest.mark.parametrize("to", ["batch", "batchless", "l1"])
def test_batches_that_are_all_non_finite_are_refused_and_nothing_changes(to):
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).double(), to)
    bad = torch.ones(8, 4, dtype=torch.float64)
    bad[0, 0] = float("inf")
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(ValueError, match=r"recalibrate: 0 \(.*\) saw no batch that is finite"):
        recalibrate(model, [bad, bad])
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))

import pytest
import torch

from normkit.study.data.augmentation import Augmentation, augment
from normkit.study.data.batches import batches, evaluation_batches
from normkit.study.data.dataset import TensorSamples
from normkit.study.data.load import load_data
from normkit.study.data.sampling import stratified, stream


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_every_batch_size_sees_the_same_sequence(batch_size):
    expected = torch.cat(list(stream(10, 37, 5, seed=1)))
    parts = list(stream(10, 37, batch_size, seed=1))
    assert torch.equal(torch.cat(parts), expected)
    assert all(len(p) == batch_size for p in parts[:-1])


def test_each_epoch_is_a_new_permutation():
    epochs = torch.cat(list(stream(10, 30, 4, seed=1))).reshape(3, 10)
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat(list(stream(10, 10, 4, seed=2))))


@pytest.mark.parametrize("start", [0, 4, 10, 12, 36])
def test_a_stream_goes_on_where_it_was(start):
    whole = torch.cat(list(stream(10, 37, 4, seed=1)))
    assert torch.equal(torch.cat(list(stream(10, 37, 4, seed=1, start=start))), whole[start:])


def test_other_random_numbers_do_not_move_the_order():
    first = torch.cat(list(stream(10, 30, 4, seed=1)))
    parts = []
    for part in stream(10, 30, 4, seed=1):
        torch.rand(7)
        parts.append(part)
    assert torch.equal(torch.cat(parts), first)


def reference_augment(image, crop, dy, dx, flip):
    padded = torch.nn.functional.pad(image[None].double(), (crop,) * 4, mode="reflect")[0]
    out = padded[:, dy : dy + image.shape[1], dx : dx + image.shape[2]]
    return (out.flip(2) if flip else out).to(image.dtype)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [0, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_is_reflect_pad_crop_and_flip(flip, crop, dtype):
    images = (torch.rand(40, 3, 6, 5) * 255).to(dtype)
    draws = torch.rand(40, 3)
    result = augment(images, Augmentation(flip, crop), draws)
    assert result.dtype == dtype
    for image, out, (v, h, f) in zip(images, result, draws.tolist(), strict=True):
        dy, dx = int(v * (2 * crop + 1)), int(h * (2 * crop + 1))
        assert torch.equal(out, reference_augment(image, crop, dy, dx, flip and f < 0.5))


def test_augmentation_draws_every_offset_and_side():
    image = torch.arange(25.0).reshape(1, 1, 5, 5).expand(400, 1, 5, 5)
    outcomes = augment(image, Augmentation(flip=True, crop=1), torch.rand(400, 3)).flatten(1).unique(dim=0)
    assert len(outcomes) == 18


def test_impossible_augmentations_are_refused():
    with pytest.raises(ValueError, match="crop 4 is too large"):
        augment(torch.zeros(1, 1, 4, 9), Augmentation(crop=4), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="needs images"):
        augment(torch.zeros(1, 4), Augmentation(flip=True), torch.zeros(1, 3))


@pytest.mark.parametrize("start", [0, 500, 1347, 1400])
def test_augmented_batches_depend_on_the_position_alone(start):
    data = load_data("digits")
    samples = TensorSamples(data, data.train, Augmentation(flip=True, crop=2))

    def inputs(**options):
        return torch.cat([micro.batch[0] for (micro,) in batches(samples, budget=1500, seed=5, **options)])

    whole, parts = inputs(batch_size=64), inputs(batch_size=7, start=start)
    assert torch.equal(parts, whole[start:])
    plain = inputs(batch_size=64, augmented=False)
    assert not torch.equal(whole, plain)


def test_evaluation_sees_every_example_once_in_order():
    data = load_data("digits")
    parts = list(evaluation_batches(TensorSamples(data, data.test), batch_size=128))
    assert torch.equal(torch.cat([y for _, y in parts]), data.test.labels)
    assert torch.equal(torch.cat([x for x, _ in parts]), data.normalise(data.test.inputs))


@pytest.mark.parametrize("count", [0, 1, 5, 60, 100])
def test_stratified_keeps_shares_to_within_one_example(count):
    labels = torch.tensor([0] * 70 + [2] * 29 + [3])[torch.randperm(100)]
    chosen = stratified(labels, count, seed=0)
    assert len(chosen.unique()) == len(chosen) == count
    taken = labels[chosen].bincount(minlength=4)
    assert (taken - torch.tensor([0.70, 0, 0.29, 0.01]) * count).abs().max() < 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [3, 7, 64, 100])
def test_the_batches_are_those_of_the_stream_whatever_is_prepared_together(batch_size, ranks):
    data = load_data("digits")
    picked = list(stream(len(data.train), 1400, batch_size, seed=2, start=42))
    samples = TensorSamples(data, data.train)
    made = [
        [
            micro.batch
            for (micro,) in batches(samples, batch_size=batch_size, budget=1400, seed=2, start=42, share=(rank, ranks))
        ]
        for rank in range(ranks)
    ]
    for parts in zip(picked, *made, strict=True):
        for rank, (inputs, labels) in enumerate(parts[1:]):
            own = parts[0].tensor_split(ranks)[rank]
            assert torch.equal(labels, data.train.labels[own])
            assert torch.equal(inputs, data.normalise(data.train.inputs[own]))

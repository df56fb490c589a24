import io
import os
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from normkit.study.data.dataset import Data, Split, make_data
from normkit.study.data.load import load_data
from normkit.study.errors import DataError

pytest.importorskip("datasets", reason="needs normkit[study]")
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", str(tmp_path / "hf" / "downloads"))


def encoded(pixels, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def pictures(count, seed=0, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_parquet(path, images, labels, image="img", label="label", names=("cat", "dog", "eel")):
    import datasets

    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(names))})
    rows = {image: [{"bytes": b, "path": None} for b in images], label: list(labels)}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "tiny"
    for role, count, seed in (("train", 30, 0), ("test", 9, 1)):
        write_parquet(
            folder / f"{role}-00000.parquet", map(encoded, pictures(count, seed)), [i % 3 for i in range(count)]
        )
    return folder


def test_digits_are_the_real_ones_in_fixed_stratified_splits():
    data = load_data("digits")
    assert (len(data.train), len(data.test), data.classes, data.input_shape) == (1347, 450, 10, (1, 8, 8))
    shares = data.test.labels.bincount() / (data.test.labels.bincount() + data.train.labels.bincount())
    assert (shares - 450 / 1797).abs().max() < 0.006  # to within one example of about 180
    again = load_data("digits")
    assert torch.equal(data.train.inputs, again.train.inputs)
    assert torch.equal(data.test.labels, again.test.labels)


def test_the_two_splits_of_digits_are_all_1797():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    both = torch.cat([data.train.inputs, data.test.inputs]).flatten(1).numpy()
    expected = load_digits().data.astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, expected))


def test_normalised_inputs_have_mean_zero_and_unit_variance():
    data = load_data("digits")
    x = data.normalise(data.train.inputs)
    assert x.dtype == torch.float32
    assert abs(x.mean().item()) < 1e-5
    assert abs(x.std(correction=0).item() - 1) < 1e-5
    assert data.train.inputs.dtype == torch.uint8  # the stored ones are untouched


def test_spiral_has_three_classes_and_is_deterministic():
    one, two = load_data("spiral"), load_data("spiral")
    assert (one.classes, one.input_shape) == (3, (2,))
    assert torch.equal(one.train.inputs, two.train.inputs)
    assert not torch.equal(one.train.inputs, one.test.inputs)
    x = one.normalise(one.train.inputs)
    assert torch.equal(x, one.train.inputs)


@pytest.mark.parametrize("amount", [0.2, 269])
def test_validation_split_is_stratified_disjoint_and_seeded(amount):
    data = load_data("digits")
    train, validation = data.split_validation(amount, seed=3)
    assert len(validation) == 269
    assert len(train) == 1347 - 269
    expected = data.train.labels.bincount().double() * 269 / 1347
    assert (validation.labels.bincount() - expected).abs().max() < 1
    both = torch.cat([train.inputs, validation.inputs]).flatten(1).numpy()
    assert sorted(map(bytes, both)) == sorted(map(bytes, data.train.inputs.flatten(1).numpy()))
    assert torch.equal(data.split_validation(amount, seed=3)[1].inputs, validation.inputs)
    assert not torch.equal(data.split_validation(amount, seed=4)[1].inputs, validation.inputs)


@pytest.mark.parametrize("amount", [0.0, 1.0, 0, 1347])
def test_an_empty_split_is_refused(amount):
    with pytest.raises(DataError, match="empty split"):
        load_data("digits").split_validation(amount)


def test_limit_takes_classes_in_proportion():
    data = load_data("digits", limit=100)
    assert len(data.train) == len(data.test) == 100
    assert data.train.labels.bincount().min() >= 9
    with pytest.raises(DataError, match="limit 0"):
        load_data("digits", limit=0)


def test_parquet_gives_exactly_the_pixels(parquet):
    data = load_data(str(parquet))
    assert data.input_shape == (3, 6, 5)
    assert data.classes == 3
    assert data.note == ""
    assert np.array_equal(data.train.inputs.numpy(), pictures(30).transpose(0, 3, 1, 2))
    assert np.array_equal(data.test.inputs.numpy(), pictures(9, 1).transpose(0, 3, 1, 2))
    assert data.train.labels.tolist() == [i % 3 for i in range(30)]
    assert data.train.inputs.is_contiguous()


def test_a_second_start_decodes_nothing_and_never_opens_the_files(parquet, monkeypatch):
    first = load_data(str(parquet))
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("loaded again"))
    second = load_data(str(parquet))
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.mean, second.mean)


def test_splits_that_are_joined_train_together(parquet):
    alone = load_data(str(parquet))
    both = load_data(str(parquet), train_split="train+test")
    assert (len(alone.train), len(both.train), len(both.test)) == (30, 39, 9)
    assert torch.equal(both.train.inputs[:30], alone.train.inputs)
    assert torch.equal(both.train.inputs[30:], both.test.inputs)
    assert "train+test" in both.note
    assert torch.equal(load_data(str(parquet)).train.inputs, alone.train.inputs)  # its cache is another
    with pytest.raises(DataError, match=r"has no extra split \(it has train, test\); change train_split"):
        load_data(str(parquet), train_split="train+extra")


@pytest.mark.parametrize(("scaling", "low", "high"), [("unit", 0.0, 1.0), ("symmetric", -1.0, 1.0)])
def test_images_are_scaled_to_a_range_instead_of_by_their_statistics(scaling, low, high):
    data = load_data("digits").scaled(scaling)
    ends = data.normalise(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    assert ends.flatten().tolist() == [low, high]


def test_inputs_that_are_no_images_have_no_range_to_scale_from():
    with pytest.raises(DataError, match="scaling 'unit': data 'spiral' has no 8-bit images"):
        load_data("spiral").scaled("unit")


def test_a_changed_file_is_decoded_again(parquet):
    before = load_data(str(parquet))
    write_parquet(parquet / "test-00000.parquet", map(encoded, pictures(12, 7)), [i % 3 for i in range(12)])
    assert len(load_data(str(parquet)).test) == 12 != len(before.test)


def test_the_cache_cannot_be_changed_through_the_tensors(parquet):
    load_data(str(parquet)).train.inputs.zero_()
    assert load_data(str(parquet)).train.inputs.max() > 0


def test_an_interrupted_decoding_leaves_nothing_half_done(parquet, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("normkit.study.data.images.np.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_data(str(parquet))
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load_data(str(parquet)).train) == 30


def test_a_damaged_cache_says_what_to_delete(parquet, tmp_path):
    load_data(str(parquet))
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "train.npy").write_bytes(b"")
    with pytest.raises(DataError, match="delete that folder"):
        load_data(str(parquet))


def test_an_unwritable_cache_names_the_variable(parquet, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="NORMKIT_CACHE"):
        load_data(str(parquet))


def test_lossy_images_are_noted_with_their_quality(tmp_path):
    for role in ("train", "test"):
        images = [encoded(p, "JPEG", quality=75) for p in pictures(6)]
        write_parquet(tmp_path / "jpeg" / f"{role}.parquet", images, [0, 1, 2] * 2)
    assert "JPEG (quality about 75)" in load_data(str(tmp_path / "jpeg")).note


def test_an_image_folder_works_and_grey_images_have_one_channel(tmp_path):
    for role in ("train", "test"):
        for name in ("ant", "bee"):
            folder = tmp_path / "pics" / role / name
            folder.mkdir(parents=True)
            for i, p in enumerate(pictures(3, shape=(4, 4))):
                Image.fromarray(p).save(folder / f"{i}.png")
    data = load_data(str(tmp_path / "pics"))
    assert data.input_shape == (1, 4, 4)
    assert data.train.labels.bincount().tolist() == [3, 3]


def test_images_of_different_sizes_need_image_size(tmp_path):
    for role in ("train", "test"):
        images = [encoded(pictures(1, i, (4 + i, 6, 3))[0]) for i in range(3)]
        write_parquet(tmp_path / "sizes" / f"{role}.parquet", images, [0, 1, 2])
    with pytest.raises(DataError, match="image_size"):
        load_data(str(tmp_path / "sizes"))
    assert load_data(str(tmp_path / "sizes"), image_size=4).input_shape == (3, 4, 4)


def test_limit_decodes_only_what_is_used(parquet, monkeypatch):
    data = load_data(str(parquet), limit=6)
    assert (len(data.train), len(data.test), data.classes) == (6, 6, 3)


def test_two_label_columns_need_a_choice(tmp_path):
    import datasets

    classes = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"img": datasets.Image(), "fine": classes, "coarse": classes})
    for role in ("train", "test"):
        rows = {
            "img": [{"bytes": encoded(p), "path": None} for p in pictures(4)],
            "fine": [0, 1, 0, 1],
            "coarse": [0, 0, 1, 1],
        }
        (tmp_path / "two").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "two" / f"{role}.parquet"))
    with pytest.raises(DataError, match=r"several columns of classes .fine, coarse.*label_column"):
        load_data(str(tmp_path / "two"))
    assert load_data(str(tmp_path / "two"), label_column="coarse").train.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("argument", ["image_column", "label_column"])
def test_an_absent_column_is_named_with_those_there_are(parquet, argument):
    with pytest.raises(DataError, match=f"{argument} 'nope' is no column.*img, label"):
        load_data(str(parquet), **{argument: "nope"})


def test_text_labels_are_numbered_in_alphabetical_order(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "kind": datasets.Value("string")})
    (tmp_path / "text").mkdir()
    for role in ("train", "test"):
        rows = {"img": [{"bytes": encoded(p), "path": None} for p in pictures(3)], "kind": ["eel", "ant", "cod"]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "text" / f"{role}.parquet"))
    assert load_data(str(tmp_path / "text"), label_column="kind").train.labels.tolist() == [2, 0, 1]


def test_no_test_split_says_so(parquet):
    (parquet / "test-00000.parquet").unlink()
    with pytest.raises(DataError, match="no labelled test split"):
        load_data(str(parquet))


def test_an_unlabelled_test_split_gives_way_to_validation(parquet):
    (parquet / "test-00000.parquet").rename(parquet / "validation-00000.parquet")
    write_parquet(parquet / "test-00000.parquet", map(encoded, pictures(3)), [-1, -1, -1])
    data = load_data(str(parquet))
    assert len(data.test) == 9
    assert "validation split serves as test" in data.note


def test_a_corrupt_parquet_file_says_so(parquet):
    (parquet / "train-00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"could not be loaded .*fetch damaged files again"):
        load_data(str(parquet))


@pytest.mark.parametrize("keep", [10, 60])
def test_a_corrupt_image_is_named(tmp_path, keep):
    good = [encoded(p) for p in pictures(3)]
    write_parquet(tmp_path / "bad" / "train.parquet", [*good[:2], good[2][:keep]], [0, 1, 2])
    write_parquet(tmp_path / "bad" / "test.parquet", good, [0, 1, 2])
    with pytest.raises(DataError, match=r"split train: image 2 (cannot be read|is damaged)"):
        load_data(str(tmp_path / "bad"))


def test_a_single_file_is_refused_since_it_has_no_test_split(parquet):
    with pytest.raises(DataError, match=r"one file, which has no test split; give a folder"):
        load_data(str(parquet / "train-00000.parquet"))


def test_images_of_more_than_eight_bits_are_refused_not_cut_off(tmp_path):
    deep = [encoded(np.full((4, 4), 1000 * (i + 1), np.uint16)) for i in range(3)]
    for role in ("train", "test"):
        write_parquet(tmp_path / "deep" / f"{role}.parquet", deep, [0, 1, 2])
    with pytest.raises(DataError, match=r"image 0 has more than 8 bits per value \(mode I;16\); scale"):
        load_data(str(tmp_path / "deep"))


@pytest.mark.parametrize(("shape", "told"), [((6, 5), "1x6x5"), ((7, 5, 3), "3x7x5")], ids=["grey", "larger"])
def test_images_of_another_shape_in_the_test_split_are_refused(parquet, shape, told):
    write_parquet(parquet / "test-00000.parquet", map(encoded, pictures(3, shape=shape)), [0, 1, 2])
    with pytest.raises(DataError, match=f"test images are {told}, those for training 3x6x5"):
        load_data(str(parquet))


def test_parquet_without_image_features_is_refused(tmp_path):
    (tmp_path / "plain").mkdir()
    for role in ("train", "test"):
        pq.write_table(pa.table({"a": [1, 2], "b": [0, 1]}), tmp_path / "plain" / f"{role}.parquet")
    with pytest.raises(DataError, match="no column of images"):
        load_data(str(tmp_path / "plain"))
    with pytest.raises(DataError, match="not images"):
        load_data(str(tmp_path / "plain"), image_column="a")


def test_without_network_a_hub_name_fails_within_seconds(monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror("no network")

    monkeypatch.setattr("normkit.study.data.hub.socket.create_connection", unreachable)
    monkeypatch.setattr("normkit.study.data.hub.getproxies", dict)
    begin = time.monotonic()
    with pytest.raises(DataError, match="needs a network connection"):
        load_data("no-such-user/no-such-data")
    assert time.monotonic() - begin < 5


FACTORY = """
import torch
from torch.utils.data import TensorDataset

def pair(n): return torch.randn(n, 4), torch.arange(n) % 2
def tensors(): return pair(8), pair(4), pair(4)
def sets(): return TensorDataset(*pair(8)), None, TensorDataset(*pair(4))
def raises(): raise RuntimeError("boom")
def two(): return pair(8), pair(4)
def shapes(): return pair(8), None, (torch.randn(4, 5), torch.arange(4))
def floats(): return pair(8), None, (torch.randn(4, 4), torch.rand(4))
def nans(): return pair(8), None, (torch.full((4, 4), float("nan")), torch.arange(4))
def measured(): return pair(8), None, TensorDataset(torch.zeros(4, 4), torch.rand(4))
def arrays(): return *(tuple(t.numpy() for t in pair(8)), None), pair(4)
def none(): return None, None, pair(4)
def empty(): return pair(8), None, pair(0)
def odd(): return pair(8), None, ["no", "pairs"]
number = 3
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "mydata.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mydata.py"


@pytest.mark.parametrize("where", ["mydata", "file"])
@pytest.mark.parametrize("name", ["tensors", "sets", "arrays"])
def test_a_factory_of_tensors_datasets_or_arrays_works(factory, where, name):
    data = load_data(f"{factory if where == 'file' else where}:{name}")
    assert (len(data.train), len(data.test), data.classes, data.input_shape) == (8, 4, 2, (4,))
    assert data.train.labels.dtype == torch.int64
    assert (data.validation is None) == (name != "tensors")
    assert len(data.split_validation(0.25)[1]) == (4 if name == "tensors" else 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "factory raised RuntimeError: boom"),
        ("two", "returned 2 values; it must return"),
        ("shapes", r"test inputs have shape \(5,\) instead of train's \(4,\)"),
        ("floats", "test: labels must be class numbers"),
        ("measured", "test: labels must be class numbers"),
        ("nans", "test: inputs contain NaN"),
        ("none", "train is None"),
        ("empty", "test: inputs .* N > 0"),
        ("odd", "test: could not be read as .input, label. pairs"),
        ("number", "no callable 'number'; it has for example .*arrays"),
        ("missing", "no callable 'missing'"),
    ],
)
def test_a_wrong_factory_is_explained(factory, name, message):
    with pytest.raises(DataError, match=message):
        load_data(f"{factory}:{name}")


@pytest.mark.parametrize("spec", ["no_such_module:make", "no/such/file.py:make"])
def test_a_factory_that_is_not_there_is_named(spec):
    with pytest.raises(DataError, match=f"data '{spec}': importing"):
        load_data(spec)


def test_columns_of_data_without_columns_are_refused():
    with pytest.raises(DataError, match="no columns"):
        load_data("digits", label_column="label")


def test_a_factory_may_return_data_itself(factory):
    factory.write_text("from normkit.study.data.load import load_data\ndef make(): return load_data('digits')\n")
    assert load_data(f"{factory}:make").input_shape == (1, 8, 8)


def test_uint8_of_a_factory_is_normalised_by_its_channels():
    inputs = torch.stack([torch.full((4, 4), 10), torch.full((4, 4), 200)]).to(torch.uint8).repeat(6, 1, 1, 1)
    inputs[::2] += 2
    data = make_data("x", Split(inputs, torch.arange(6) % 2), Split(inputs, torch.arange(6) % 2))
    assert isinstance(data, Data)
    assert data.mean.tolist() == [11.0, 201.0]
    assert data.std.tolist() == [1.0, 1.0]


def test_a_dataset_with_tensor_labels_works(factory):
    assert (
        len(TensorDataset(torch.zeros(2, 1), torch.zeros(2))) == 2
    )  # the labels below are such zero-dimensional tensors
    assert load_data(f"{factory}:sets").train.labels.tolist() == [0, 1] * 4


def test_the_folder_can_go_once_it_is_cached_only_with_its_path(parquet):
    load_data(str(parquet))
    shutil.rmtree(parquet)
    with pytest.raises(DataError, match="no such folder"):
        load_data(str(parquet))


def test_a_part_of_a_split_is_rows_and_no_copy():
    data = load_data("digits")
    train, validation = data.split_validation(0.2)
    assert train.stored.data_ptr() == validation.stored.data_ptr() == data.train.stored.data_ptr()
    assert train.nbytes + validation.nbytes == data.train.nbytes
    half = train.take(torch.arange(0, len(train), 2))
    inputs, labels = half.examples(torch.tensor([3, 1]))
    assert torch.equal(inputs, train.inputs[[6, 2]])
    assert torch.equal(labels, train.labels[[6, 2]])
    assert torch.equal(half.examples(slice(1, 3))[0], train.inputs[2:6:2])


def sparse_cache(entry, images, side=128):
    """A cache entry as decoding writes it, of black images that take no room on the disk, and no decoding."""
    entry.mkdir(parents=True)
    for role, count in (("train", images), ("test", 20)):
        with (entry / f"{role}.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, side, side)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + count * 3 * side * side)
        np.save(entry / f"{role}_labels.npy", np.arange(count) % 10)
    (entry / "meta.json").write_text('{"notes": [], "roles": ["train", "test"], "classes": 10}')


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="asks the system for its memory")
def test_data_larger_than_the_memory_is_split_checked_and_read(tmp_path, monkeypatch):
    from normkit.study.check import check
    from normkit.study.config import StudyConfig
    from normkit.study.data import images
    from normkit.study.data.batches import batches

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = int(1.5 * memory) // (3 * 128**2)
    (tmp_path / "huge").mkdir()
    monkeypatch.setattr(images, "_choose", lambda *_: None)
    monkeypatch.setattr(images, "_decode", lambda *arguments: sparse_cache(arguments[-1], count))
    monkeypatch.setattr(images, "load_source", lambda _: None)
    monkeypatch.setattr("normkit.study.data.dataset.SAMPLE", 50)
    monkeypatch.setattr(Split, "inputs", property(lambda _: pytest.fail("the whole split was read")))
    task = check(StudyConfig(data=str(tmp_path / "huge"), model="cnn5", batch_sizes=(4,), budget=8))
    assert (len(task.train) + len(task.validation), task.train.split.stored.shape[0]) == (count, count)
    assert task.validation.split.labels.bincount().min() >= count // 50 - 1
    seen = list(batches(task.train, batch_size=4, budget=8, seed=0))
    assert [tuple(micro.batch[0].shape) for (micro,) in seen] == [(4, 3, 128, 128)] * 2

"""Generated command lines, data and models: one line and exit code 2, no traceback, and the next right command works.

50 examples in the inner loop, 500 with ``--hypothesis-profile=nightly``. Nothing is trained: a command that gets that far is
right.
"""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from normkit.cli.main import main

OWN = """
import sys
import numpy as np
import torch
from torch import nn

x, y = torch.randn(60, 5), torch.arange(60) % 3

def split(x, y): return (x[:40], y[:40]), None, (x[40:], y[40:])
def good(): return split(x, y)
def images(): return split((255 * torch.rand(60, 3, 8, 8)).to(torch.uint8), y)
def raises(): raise RuntimeError("first line\\nsecond line " + "x" * 900)
def exits(): sys.exit(0)
def nothing(): return None
def two(): return split(x, y)[:2]
def empty(): return split(x[:0], y[:0])
def one_class(): return split(x, y * 0)
def huge_class(): return split(x, y + 2**40)
def negative(): return split(x, y - 1)
def infinite(): return split(x / 0, y)
def sparse(): return split(x, y)[0][0].to_sparse(), None, (x, y)
def meta(): return split(x.to("meta"), y)
def text(): return split(np.array(["a"] * 60)[:, None], y)
def ragged(): return [(x[i, : i % 3 + 1], 0) for i in range(60)], None, split(x, y)[2]
number = 5

def model(shape, classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.BatchNorm1d(8), nn.Linear(8, classes))
def fits(shape, classes):
    size = int(np.prod(shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))
def wrong_input(shape, classes): return nn.Linear(777, classes)
def wrong_output(shape, classes): return nn.Sequential(fits(shape, classes), nn.Linear(classes, classes + 1))
def no_weights(shape, classes): return nn.Flatten()
def no_module(shape, classes): return "model"
def model_exits(shape, classes): sys.exit(3)
def on_meta(shape, classes): return fits(shape, classes).to("meta")
shared = nn.Sequential(nn.Flatten(), nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
def same(shape, classes): return shared
"""
DATA = (
    *(
        "good",
        "images",
        "raises",
        "exits",
        "nothing",
        "two",
        "empty",
        "one_class",
        "huge_class",
        "negative",
        "infinite",
    ),
    *("sparse", "meta", "text", "ragged", "number", "gone"),
)
MODELS = (
    *(
        "fits",
        "wrong_input",
        "wrong_output",
        "no_weights",
        "no_module",
        "model_exits",
        "on_meta",
        "same",
        "model",
        "number",
    ),
    "gone",
)
NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from(["1e999", "nan", "-0", "x", "", "1.5", 2**40, 10**30, "0x10", "1,000", "٣"])
)
LISTS = st.lists(NUMBERS, max_size=3).map(lambda values: ",".join(map(str, values)))
METHODS = st.lists(st.sampled_from(["batch", "none", "bnp", "bach", "", "BATCH", "none+noise"]), max_size=3).map(
    ",".join
)
FRACTIONS = st.sampled_from(["0", "0.5", "1", "-1", "nan", "inf", "1e-9", "x"])
TEXT = st.text(max_size=12).filter(lambda text: "\0" not in text)


class Trained(BaseException):
    """A command got as far as training: it was right."""


def refuse(*_, **__):
    raise Trained


def own(names):
    return st.sampled_from(names).map(lambda name: f"own.py:{name}")


SHARED = {
    "--data": st.one_of(own(DATA), own(["good"]), st.sampled_from(["digts", "no/such", "", "own.py", ".", "spiral"])),
    "--model": st.one_of(
        own(MODELS), own(["fits"]), st.sampled_from(["resnet19", "hf:", "wrn-1-1", "", "mlp", "vgg13"])
    ),
    "--limit": NUMBERS,
    "--device": st.sampled_from(["cpu", "cuda:99", "meta", "gpu", ""]),
    "--weight-decay": FRACTIONS,
}
COMMANDS = {
    "compare": {
        **SHARED,
        "--methods": METHODS,
        "--batch-sizes": LISTS,
        "--seeds": NUMBERS,
        "--lr-points": NUMBERS,
        "--search-seeds": NUMBERS,
        "--budget": NUMBERS,
        "--lr": st.one_of(
            FRACTIONS, st.sampled_from(["auto", "batch=0.1", "batch=0.1,batch=0.2", "=", "batch=", "none=x"])
        ),
        "--image-size": NUMBERS,
        "--validation": FRACTIONS,
        "--warm-up": FRACTIONS,
        "--momentum": FRACTIONS,
        "--crop": NUMBERS,
        "--micro-batch": NUMBERS,
        "--workers": NUMBERS,
        "--label-column": TEXT,
        "--storage": st.sampled_from([
            "sqlite://",
            "sqlite:////no/such/x.db",
            "x",
            "postgresql://me:pw@127.0.0.1:x/y",
            "",
        ]),
        "--track": st.sampled_from(["nothing", "tensorbord", ""]),
        "--schedule": st.sampled_from(["cosine", "linear", ""]),
        "--nonsense": TEXT,
    },
    "landscape": {
        **SHARED,
        "--methods": METHODS,
        "--batch-size": NUMBERS,
        "--steps": NUMBERS,
        "--every": NUMBERS,
        "--lr": FRACTIONS,
        "--span": LISTS,
    },
    "doctor": {
        **SHARED,
        "--method": st.sampled_from(["batch", "none", "bach", ""]),
        "--batch-size": NUMBERS,
        "--accumulate": NUMBERS,
        "--checkpoint": st.sampled_from(["own.py", "gone.pt", ".", ""]),
    },
    "reproduce": {
        "--scale": FRACTIONS,
        "--seeds": NUMBERS,
        "--methods": METHODS,
        "--model": st.sampled_from(["x", "resnet20"]),
    },
    "report": {},
    "worker": {"--workers": NUMBERS, "--storage": st.sampled_from(["sqlite://", "x", ""]), "--study": TEXT},
    "compar": {},
}
RIGHT = (
    "compare --data own.py:good --model own.py:fits --methods batch,none --batch-sizes 8 --budget 8 --quiet --out out"
)


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(["compare"] * 8 + ["landscape", "doctor"] * 3 + list(COMMANDS)))
    options = COMMANDS[name]
    arguments = [name]
    if name in ("compare", "landscape", "doctor"):
        arguments += ["--data", "own.py:good", "--model", "own.py:fits"]
    if name == "compare":
        arguments += ["--batch-sizes", "8", "--budget", "64", "--quiet"]
    for option in draw(st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True)) if options else ():
        value = str(draw(options[option]))
        arguments += draw(st.sampled_from([[option, value], [f"{option}={value}"]]))
    if name in ("reproduce", "report"):
        arguments.append(draw(st.sampled_from(["batchless-mnist", "riemannian-cifar10", "no-such", ".", ""])))
    return [*arguments, "--out", "out"] if name in ("compare", "landscape", "reproduce") else arguments


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for place in (
        "compare.measure_costs",
        "compare.run_workers",
        "landscape.run.train_and_measure",
        "store.join_studies.run_workers",
    ):
        monkeypatch.setattr(f"normkit.study.{place}", refuse)
    monkeypatch.setattr("normkit.instruments.doctor", refuse)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def run(arguments):
    """Exit code and standard error; code None where the command went on to train."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except Trained:
            code = None
        except SystemExit as error:  # from the parser, before a command ran
            code = error.code
            assert "Traceback" not in errors.getvalue()
            return code, "error: of the parser"
    return code, errors.getvalue()


@settings(
    max_examples=50 if settings().max_examples < 500 else 500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(arguments=command_lines())
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(3600)
def test_a_command_line_is_right_or_refused_in_one_line_and_the_next_right_one_works(here, arguments):
    shutil.rmtree(here / "out", ignore_errors=True)
    code, errors = run(arguments)
    event(f"{arguments[0]}: {code}")
    assert code in (None, 0, 1, 2), arguments
    if code == 2:
        lines = [line for line in errors.splitlines() if line.strip()]
        assert sum(line.startswith("error: ") for line in lines) == 1, (arguments, errors)
        assert lines[-1].startswith("error: "), (arguments, errors)
        assert len(lines[-1]) < 300, (arguments, errors)
        assert arguments[0] not in ("landscape", "reproduce") or not any(Path("out").glob("*")), arguments
    assert "Traceback" not in errors, arguments
    shutil.rmtree(here / "out", ignore_errors=True)
    assert run(RIGHT.split()) == (None, ""), arguments

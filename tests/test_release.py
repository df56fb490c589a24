"""What is released: the wheel works with torch alone, the source distribution is whole, the files agree with one another."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import normkit

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it under its former name
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def _torch_and_what_it_needs() -> set[str]:
    """Return the distributions that ``pip install torch`` brings."""
    found: set[str] = set()
    waiting = ["torch"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        needed = [Requirement(line) for line in distribution(name).requires or ()]
        waiting += [entry.name for entry in needed if entry.marker is None or entry.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment with the wheel, torch and nothing else; torch is linked, not copied."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    executable = folder / "bin" / "python"
    where = [str(executable), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    for name in _torch_and_what_it_needs():
        for top in {
            path.parts[0] for path in distribution(name).files or () if path.parts[0] not in ("..", "__pycache__")
        }:
            (site / top).symlink_to(distribution(name).locate_file(top))
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return executable


def _run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-W", "error", "-W", "ignore:Failed to initialize NumPy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_the_wheel_trains_with_torch_alone(python):
    program = (
        "import importlib.util, torch, normkit\n"
        "assert importlib.util.find_spec('numpy') is None and importlib.util.find_spec('optuna') is None\n"
        "for name in ('bnp', 'batchless', 'sgd-g', 'adam-g', 'revisited', 'l1', 'group'):\n"
        "    torch.manual_seed(0)\n"
        "    layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()]\n"
        "    x, net = torch.randn(8, 1, 6, 6), torch.nn.Sequential(*layers, torch.nn.Linear(64, 2))\n"
        "    model, optimizer = normkit.apply(name, net, lr=0.01, batches=[x])\n"
        "    model(x).square().mean().backward()\n"
        "    optimizer.step()\n"
        "print(normkit.__version__)\n"
    )
    ran = _run(python, "-c", program)
    assert (ran.stdout.strip(), ran.stderr) == (normkit.__version__, "")


@pytest.mark.slow
def test_the_command_names_the_extra_that_it_needs(python):
    ran = _run(python, "-m", "normkit", "compare")
    assert ran.returncode != 0
    assert "pip install 'normkit[study]'" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_the_source_distribution_builds_the_site_and_runs_the_tests(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    files = ("mkdocs.yml", "constraints.txt", "CHANGELOG.md", "LICENSE", "tests/conftest.py", "docs/index.md")
    assert {*files, "src/normkit/py.typed"} <= names


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(built):
    kept = {path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        missing = {str(path.relative_to(ROOT / "src")) for path in kept} - set(wheel.namelist())
    assert missing == set()


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needed = {Requirement(line).name.lower() for group in (project["dependencies"], *extras) for line in group}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {Requirement(line).name.lower() for line in lines}
    assert needed - pinned - {"normkit"} == set()


def test_the_citation_names_the_five_papers():
    cited, readme = (
        set(re.findall(r"\b\d{4}\.\d{5}\b", (ROOT / name).read_text())) for name in ("CITATION.cff", "README.md")
    )
    assert len(cited) == 5
    assert cited <= readme


@pytest.mark.parametrize(
    "file",
    [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"],
    ids=lambda file: file.name,
)
def test_the_project_files_are_yaml(file):
    assert isinstance(yaml.safe_load(file.read_text()), dict)

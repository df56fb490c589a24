"""The documentation builds without a warning, and its reference is complete."""

import inspect
import os
import re
import subprocess
import sys
from html import unescape
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ("normkit", "normkit.functional", "normkit.moments", "normkit.instruments")
CALLBACKS = [
    f"normkit.integrations.{framework}.{name}Callback"
    for framework in ("lightning", "huggingface")
    for name in ("BNP", "Batchless", "Monitor")
]
PUBLIC = [
    f"{module}.{name}"
    for module in MODULES
    for name in getattr(import_module(module), "__all__", ())
    if not inspect.ismodule(getattr(import_module(module), name)) and (module, name) != ("normkit", "doctor")
]
ENTRY = re.compile(r'<div class="doc doc-object doc-(?:class|function)">\s*<h[23] id="([\w.]+)"')

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def entries(site) -> dict[str, str]:
    """The HTML of every entry of the reference, by the name of its object."""
    found = {}
    for page in sorted((site / "reference").glob("*/index.html")):
        _, *parts = ENTRY.split(page.read_text())
        found |= dict(zip(parts[::2], parts[1::2], strict=True))
    return found


def _signature(entry: str) -> str:
    match = re.search(r'<div class="doc-signature highlight">(.*?)</div>', entry, re.DOTALL)
    return unescape(re.sub(r"<[^>]+>", "", match[1])) if match else ""


@pytest.mark.parametrize("name", PUBLIC + CALLBACKS)
def test_every_public_name_has_a_signature_and_its_arguments_described(name, entries):
    module, attribute = name.rsplit(".", 1)
    value = getattr(import_module(module), attribute)
    made = (
        vars(next(cls for cls in value.__mro__ if "__init__" in vars(cls)))["__init__"]
        if inspect.isclass(value)
        else value
    )
    if not made.__module__.startswith("torch."):  # the builder reads this package's code alone
        assert _signature(entries[name]).startswith(f"{attribute}(")
    sections = entries[name]
    if inspect.isclass(value):  # the three dimensions of a layer share a description, that of their base
        sections += "".join(entries.get(f"{base.__module__}.{base.__qualname__}", "") for base in value.__mro__[1:])
    if inspect.signature(value).parameters:
        assert re.search(r"doc-section-title\">(Parameters|Attributes):", sections)


def test_no_role_of_another_markup_is_left_raw(site):
    raw = [
        f"{page.relative_to(site)}: {match}"
        for page in sorted(site.rglob("*.html"))
        for match in re.findall(r":[a-z]+:<code>.*?</code>|:[a-z]+:`[^`]*`", page.read_text())
    ]
    assert raw == []


def test_every_result_is_listed():
    listed = (ROOT / "docs/results/index.md").read_text()
    pages = {str(page.relative_to(ROOT / "docs/results")) for page in (ROOT / "docs/results").rglob("*.md")} - {
        "index.md"
    }
    assert [page for page in sorted(pages) if f"({page})" not in listed] == []

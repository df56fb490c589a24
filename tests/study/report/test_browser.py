import json
import re
import shutil
import subprocess
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest

from normkit.study.report.render import write_report
from tests.study.report.fake_study import realistic, record, result
from tests.study.report.test_render import HOSTILE, hostile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the report in"),
]

STUDIES = {
    "whole": partial(realistic, seeds=5),
    "hostile": hostile,
    "long name": partial(
        realistic, methods=("batch", "a-method-with-a-name-of-more-than-forty-letters"), data="x" * 300
    ),
    "twelve methods": partial(realistic, methods=("batch", *(f"method-{k}" for k in range(11)))),
    "all diverged": lambda: record([result(size=s, seed=k, state="diverged") for s in (8, 1) for k in range(2)]),
    "nothing yet": partial(record, [], planned=60),
}
WIDTHS = (390, 1200)

# Opens every report in a frame of every width and writes what it finds into the page.
HARNESS = """<!doctype html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<pre id="out"></pre>
<script>
const found = [];
function look(frame, name, width) {
  const page = frame.contentDocument, style = (e) => frame.contentWindow.getComputedStyle(e);
  const seen = [...page.querySelectorAll("svg.chart")].filter((svg) => svg.getBoundingClientRect().width > 0);
  const round = (b) => [b.left, b.top, b.right, b.bottom].map(Math.round);
  const box = (e) => round(e.getBoundingClientRect());
  const line = page.querySelector("svg.chart .line.c1");
  found.push({
    name, width, scroll: page.documentElement.scrollWidth, client: page.documentElement.clientWidth,
    charts: seen.map((svg) => ({
      alt: svg.getAttribute("aria-label"), texts: [...svg.querySelectorAll("text")].map(box),
      names: [...svg.querySelectorAll("text.name")].map(box) })),
    tables: [...page.querySelectorAll(".scroll")].map((e) => [e.scrollWidth, e.clientWidth, style(e).overflowX]),
    paper: style(page.body).backgroundColor, ink: style(page.body).color, stroke: line ? style(line).stroke : null,
    smallest: Math.min(...seen.flatMap((svg) => [...svg.querySelectorAll("text")].map(
      (e) => parseFloat(style(e).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)), 99),
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
    scripts: page.scripts.length, text: page.body.innerText,
  });
  document.getElementById("out").textContent = JSON.stringify(found);
  if (found.length === jobs.length) console.log("harness done");
}
const jobs = JOBS;
for (const [name, width] of jobs) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.style.border = "0";
  frame.onload = () => look(frame, name, width);
  frame.src = encodeURIComponent(name) + "/report.html";
  document.body.append(frame);
}
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server on this machine that holds the reports; gives its address and the paths it was asked for."""
    folder, asked = tmp_path_factory.mktemp("site"), []
    for name, study in STUDIES.items():
        write_report(study(), folder / name)
    jobs = [[name, width] for name in STUDIES for width in WIDTHS]
    (folder / "harness.html").write_text(HARNESS.replace("JOBS", json.dumps(jobs)))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/harness.html", asked
    server.shutdown()
    server.server_close()
    thread.join()


def browse(address, profile, *, dark):
    command = [
        CHROMIUM,
        *(
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
            "--hide-scrollbars",
        ),
        *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"),
        *("--enable-logging=stderr", "--dump-dom", f"--blink-settings=preferredColorScheme={0 if dark else 1}"),
        address,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    pages = {(page["name"], page["width"]): page for page in json.loads(unescape(found.group(1)))}
    assert len(pages) == len(STUDIES) * len(WIDTHS)
    return pages, console


@pytest.fixture(scope="module")
def light(site, tmp_path_factory):
    return browse(site[0], tmp_path_factory.mktemp("light"), dark=False)


@pytest.fixture(scope="module")
def dark(site, tmp_path_factory):
    return browse(site[0], tmp_path_factory.mktemp("dark"), dark=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", STUDIES)
def test_page_never_scrolls_sideways(light, name, width):
    page = light[0][name, width]
    assert page["client"] == width
    assert page["scroll"] <= width
    for chart in page["charts"]:
        assert all(left >= 0 and right <= width for left, _, right, _ in chart["texts"])


def test_wide_tables_scroll_within_themselves_on_a_phone(light):
    tables = light[0]["whole", 390]["tables"]
    assert any(content > visible for content, visible, _ in tables)
    assert all(overflow == "auto" for *_, overflow in tables)


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_of_lines_do_not_overlap_and_figures_have_a_text(light, width):
    for name in ("whole", "hostile", "long name", "twelve methods"):
        charts = light[0][name, width]["charts"]
        assert len(charts) >= 5
        for chart in charts:
            assert len(chart["alt"]) > 60
            tops = sorted(top for _, top, _, _ in chart["names"])
            assert all(below - above >= 9 for above, below in pairwise(tops))


@pytest.mark.parametrize("width", WIDTHS)
def test_text_in_figures_is_large_enough_to_read(light, width):
    assert light[0]["whole", width]["smallest"] >= 9


def test_nothing_is_loaded_but_the_page_and_the_console_is_silent(light, site):
    pages, console = light
    assert all(page["requests"] == [] for page in pages.values())
    assert {path.rpartition("/")[2] for path in site[1]} == {"harness.html", "report.html"}
    assert len(console) == 1, console
    assert "harness done" in console[0]


def test_hostile_names_are_shown_and_not_run(light):
    page = light[0]["hostile", 1200]
    assert page["scripts"] == 0
    assert HOSTILE in page["text"]


def test_dark_mode_changes_page_and_figures(light, dark):
    bright, night = light[0]["whole", 1200], dark[0]["whole", 1200]
    assert luminance(bright["paper"]) > 0.8 > 0.3 > luminance(bright["ink"])
    assert luminance(night["paper"]) < 0.2 < 0.7 < luminance(night["ink"])
    assert bright["stroke"] != night["stroke"]
    assert dark[1] == [line for line in dark[1] if "harness done" in line]


def luminance(colour):
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

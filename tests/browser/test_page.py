"""The report in headless Chromium: it draws, it fits a phone, it is quiet."""

import re
import shutil
import subprocess

import pytest

from salsa.report.page import render
from tests.evaluation_page import evaluation

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=10000",
]
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  document.title = "WIDTH " + document.documentElement.scrollWidth + " PLOTS " +
    document.querySelectorAll(".js-plotly-plot .main-svg").length + " TRACES " +
    document.querySelectorAll(".js-plotly-plot .trace").length; }, 500));</script></body>"""


def chromium(*arguments: str, profile) -> str:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    """The finished run's report with a probe that writes what it sees into the title."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text((finished / "report.html").read_text().replace("</body>", PROBE))
    return file


BROWSE = """<script>addEventListener("load", () => setTimeout(() => {
  const started = performance.now(), select = document.querySelector("[data-filter=verdict]");
  const where = () => document.getElementById("where").textContent, count = of => document.querySelectorAll(of).length;
  const all = where();
  select.value = "games disagree"; select.onchange();
  const some = where();
  document.getElementById("on").click();
  const next = where();
  document.querySelector(".row button").click();
  document.title = [`ALL ${all} SOME ${some} NEXT ${next} OPEN ${count(".said h3")} ROWS ${count(".row")}`,
    `MS ${Math.round(performance.now() - started)} WIDTH ${document.documentElement.scrollWidth}`,
    `PLOTS ${count(".js-plotly-plot .main-svg")}`].join(" ");
}, 500));</script></body>"""
SEEN = re.compile(
    r"ALL 1–25 of (\d+) SOME 1–25 of (\d+) NEXT 26–50 of (\d+) OPEN (\d+) ROWS (\d+) "
    r"MS (\d+) WIDTH (\d+) PLOTS (\d+)"
)


@pytest.fixture(scope="module")
def evaluation_page(tmp_path_factory):
    """An evaluation with 1,020 verdicts, and a probe that browses them."""
    file = tmp_path_factory.mktemp("evaluation") / "report.html"
    file.write_text(render(*evaluation(170)).replace("</body>", BROWSE))
    return file


@pytest.mark.parametrize("width", [500, 1280])
def test_a_thousand_verdicts_are_browsed_at_once(evaluation_page, width, tmp_path):
    dom = chromium(
        f"--window-size={width},900", "--dump-dom", evaluation_page.as_uri(), profile=tmp_path
    )
    seen = SEEN.search(dom)
    assert seen, "the page's script did not run to its end"
    total, some, after, opened, rows, milliseconds, scroll_width, plots = map(int, seen.groups())
    assert total == 1020 and 25 < some == after < 1020
    assert opened >= 5 and rows == 25  # questions, two answers, two games
    assert milliseconds < 500 and scroll_width <= width and plots >= 5


@pytest.mark.parametrize("width", [500, 1280])
def test_plots_draw_and_nothing_runs_over_the_edge(page, width, tmp_path):
    dom = chromium(f"--window-size={width},900", "--dump-dom", page.as_uri(), profile=tmp_path)
    seen = re.search(r"WIDTH (\d+) PLOTS (\d+) TRACES (\d+)", dom)
    assert seen, "the page's script did not run to its end"
    scroll_width, plots, traces = map(int, seen.groups())
    assert scroll_width <= width
    assert plots >= 9 and traces >= 20


def test_a_screenshot_is_not_blank(page, tmp_path):
    picture = tmp_path / "page.png"
    chromium(
        f"--screenshot={picture}",
        "--window-size=1280,2400",
        page.as_uri(),
        profile=tmp_path / "profile",
    )
    assert picture.stat().st_size > 50_000

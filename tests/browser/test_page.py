"""The report in headless Chromium: it draws, it fits a phone, it is quiet."""

import re
import shutil
import subprocess

import pytest

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

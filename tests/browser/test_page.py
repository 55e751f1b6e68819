"""The report in headless Chromium, desktop and phone, light and dark: it draws, fits, works and is quiet."""

from statistics import mean, pstdev

import pytest

from salsa.artifacts import read_jsonl
from salsa.report.page import render, write_report
from tests.chromium import CHROMIUM, chromium
from tests.evaluation_page import evaluation
from tests.many_runs import a_forecast, a_landscape, many_runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
WIDTHS = [380, 1200]
screens = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
widths = pytest.mark.parametrize("width", WIDTHS, ids=["phone", "desktop"])

DRAWN = """new Promise(drawn => { const look = () => document.querySelector(".plot:not(.js-plotly-plot)") ?
  setTimeout(look, 20) : requestAnimationFrame(() => setTimeout(drawn)); look(); })"""
COUNT = "document.querySelectorAll({!r}).length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def show(browser):
    """Open a file on a screen and wait for its plots; at the end it must have fitted and been quiet."""
    opened = []

    def show(file, width=1200, dark=False):
        page = browser.page(width, dark=dark)
        page.open(file)
        opened.append((page, file, width))
        page.run(DRAWN)
        return page

    yield show
    for page, file, width in opened:
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.complaints() == []
        assert page.requests() == [file.as_uri()]
        page.call("Page.close")


@pytest.fixture(scope="module")
def report(finished):
    return finished / "report.html"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation with 1,020 verdicts."""
    file = tmp_path_factory.mktemp("evaluation") / "report.html"
    file.write_text(render(*evaluation(170)))
    return file


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Runs whose curves are known: arm-1 gains 0.5 more than arm-0 at any KL."""
    results, run = many_runs(tmp_path_factory.mktemp("known"))
    write_report(results, run, forecast=a_forecast(), landscape=a_landscape())
    return run.path / "report.html"


@screens
@widths
def test_plots_draw_and_nothing_runs_over_the_edge(report, show, width, dark):
    page = show(report, width, dark)
    assert page.run(COUNT.format(".js-plotly-plot .main-svg")) >= 9
    assert page.run(COUNT.format(".js-plotly-plot .trace")) >= 20
    ink = page.run("getComputedStyle(document.querySelector('.gtitle')).fill")
    assert ink == ("rgb(233, 234, 236)" if dark else "rgb(28, 29, 31)")


def test_a_screenshot_is_not_blank(report, show, tmp_path):
    show(report).screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


@widths
def test_a_thousand_verdicts_are_browsed_at_once(evaluated, show, width):
    page = show(evaluated, width)
    where = "document.getElementById('where').textContent"
    assert page.run(where) == "1–25 of 1020"
    milliseconds = page.run("""(() => {
      const started = performance.now(), select = document.querySelector("[data-filter=verdict]");
      select.value = "games disagree"; select.onchange();
      return performance.now() - started; })()""")
    some = page.run(where)
    assert some.startswith("1–25 of ") and 25 < int(some.split()[-1]) < 1020
    page.run("document.getElementById('on').click()")
    assert page.run(where) == "26–50 of " + some.split()[-1]
    page.run("document.querySelector('.row button').click()")
    assert page.run(COUNT.format(".said h3")) >= 5  # questions, two answers, two games
    assert page.run(COUNT.format(".row")) == 25
    assert milliseconds < 500
    assert page.run(COUNT.format("p.legend")) == 0  # few names stand over each plot
    assert page.run(COUNT.format(".js-plotly-plot .main-svg")) >= 5


@screens
@widths
def test_forecast_and_landscape_stand_in_the_report(known, show, width, dark):
    page = show(known, width, dark)
    heads = page.run("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert "What each reference is worth before RL" in heads and "Between sft[0], sft[1]" in heads
    for kind, plots in (("forecast", 4), ("landscape", 2), ("replies", 1)):
        assert page.run(COUNT.format(f"[data-plots={kind}] .main-svg")) >= plots
    assert page.run("document.querySelectorAll('#places tbody tr').length") == 3


CELLS = "[...document.querySelectorAll('#matched tr')].map(row => [...row.cells].map(cell => cell.textContent))"


@screens
@widths
def test_rewards_at_a_kl_that_the_reader_picks(known, show, width, dark):
    page = show(known, width, dark)
    page.run("document.getElementById('yardstick').value = '1'")  # the own reference: every update
    page.run("document.getElementById('yardstick').onchange()")
    page.run("(() => { const e = document.getElementById('nats'); e.value = '4'; e.oninput(); })()")
    base, better, dead = page.run(CELLS)
    assert base[0] == "arm-0" and base[1] == "update 16.62 of 2 seeds"  # 1 + 0.4 · 39 updates
    # √4 between two updates, the mean of seeds that differ by 0.1; ± 12.706 · 0.05 for two seeds
    assert base[2] == "+2.050[+1.414, +2.685]" and base[3] == "baseline"
    assert better[2].startswith("+2.55") and better[3] == "+0.500[+0.500, +0.500]"
    assert dead[3] == "+0.000[+0.000, +0.000]" and dead[5] == "+0.000[+0.000, +0.000]"
    seeds = "[...document.querySelectorAll('#by-seed tr')].map(row => row.textContent)"
    assert page.run(seeds)[0] == "arm-1proxy+0.500+0.500"


def test_the_slider_is_worked_by_keys_and_moves_the_line(known, show):
    page = show(known)
    line = "document.getElementById('frontier-0-proxy').layout.shapes.map(s => s.x0)"
    page.run("document.getElementById('level').focus()")
    before = page.run("Number(document.getElementById('level').value)")
    page.press("ArrowRight")
    after = page.run("Number(document.getElementById('level').value)")
    assert after > before
    assert page.run("document.getElementById('level').getAttribute('aria-valuetext')") == (
        f"{after:.2f} nats per response"
    )
    page.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
    assert page.run(line) == [after]
    assert page.run(line.replace("0-proxy", "1-proxy")) == []  # another yardstick
    page.press("End")
    page.run(
        "(() => { const e = document.getElementById('nats'); e.value = '99'; e.oninput(); })()"
    )
    assert all(row[1] == "not reached0 of 2 seeds" and row[2] == "–" for row in page.run(CELLS))


@widths
def test_every_table_is_copied_as_markdown(known, show, width):
    page = show(known, width)
    assert page.run(COUNT.format("table")) == page.run(COUNT.format("button.copy")) >= 5
    page.run("""(() => { window.copied = []; const writeText = async text => { copied.push(text) };
      Object.defineProperty(navigator, "clipboard", { value: { writeText } }); })()""")
    tools = "document.querySelector('#headline').closest('.scroll').nextSibling"
    page.run(f"{tools}.querySelector('button').click()")
    head, rule, sft, *_ = page.run("copied[0]").splitlines()
    assert head.startswith("| arm | proxy (trained on) | gold (held out) |")
    assert set(rule) == set("|-: ") and head.count("|") == rule.count("|") == sft.count("|")
    assert sft.startswith("| sft not trained by RL |")
    assert page.run(f"{tools}.querySelector('[role=status]').textContent") == "Copied."


def test_copying_works_without_the_clipboards_permission(known, show):
    page = show(known)
    page.run("""(() => { window.copied = [];
      Object.defineProperty(navigator, "clipboard", { value: undefined });
      document.addEventListener("copy", () => copied.push(document.activeElement.value)); })()""")
    page.run("document.querySelector('button.copy').click()")
    assert page.run("copied[0]").startswith("| arm |")
    assert page.run("document.querySelector('.tools [role=status]').textContent") == "Copied."


@screens
@widths
def test_alarms_are_listed_and_marked_on_their_curves(known, show, width, dark):
    page = show(known, width, dark)
    listed = page.run("[...document.querySelectorAll('.alarms li')].map(li => li.textContent)")
    assert [text.split(":")[0] for text in listed] == ["arm-2 seed 0", "arm-2 seed 1"]
    assert all("entropy collapse at update 21" in text for text in listed)
    for panel, marks in (("score", 2), ("entropy", 2), ("length", 0)):
        last = f"document.getElementById('curve-{panel}').data.at(-1)"
        assert page.run(f"({last}.hovertext || []).length") == marks
    hover = """new Promise(done => { const plot = document.getElementById("curve-entropy");
      Plotly.Fx.hover(plot, [{ curveNumber: plot.data.length - 1, pointNumber: 0 }]);
      setTimeout(() => { const label = plot.querySelector(".hovertext"), box = label.getBoundingClientRect();
        done([label.textContent, box.left, box.right]); }, 100); })"""
    text, left, right = page.run(hover)
    assert "arm-2 seed 0: entropy collapse" in text
    assert 0 <= left < right <= width


@widths
def test_which_seeds_unfolds_every_pair(known, show, width):
    page = show(known, width)
    page.run("document.querySelector('#seeds summary').click()")
    rows = page.run(
        "[...document.querySelectorAll('#seeds tbody tr')].map(row => row.cells.length)"
    )
    assert rows == [4] * 12  # six pairs by two scores; pair, seeds ahead, two seeds
    first = "document.querySelector('#seeds td').getBoundingClientRect().width"
    assert 0 < page.run(first) < width / 2


REPLIES = "[...document.querySelectorAll('#reply-rows tr')].map(tr => [...tr.cells].map(td => td.textContent))"


def sort(page, by):
    page.run(
        f"(() => {{ const e = document.getElementById('reply-order'); e.value = '{by}'; e.onchange(); }})()"
    )


@screens
@widths
def test_replies_side_by_side_sorted_and_searched(known, show, width, dark):
    page = show(known, width, dark)
    samples = {
        arm: read_jsonl(known.parent / f"{arm}-0" / "samples.jsonl")
        for arm in ("sft", "arm-0", "arm-1", "arm-2")
    }
    spread = [
        max(p) - min(p)
        for p in zip(*([r["proxy"] for r in s] for s in samples.values()), strict=True)
    ]
    first, *others = page.run(REPLIES)
    widest = max(range(20), key=spread.__getitem__)
    assert first[0].startswith(samples["sft"][widest]["prompt"])
    assert f"no. {widest + 1} · spread {spread[widest]:.2f}" in first[0]
    for cell, rows in zip(first[1:], samples.values(), strict=True):
        assert rows[widest]["response"] in cell
        assert f"proxy {rows[widest]['proxy']:+.2f}".replace("-", "−") in cell
    assert len(others) == 9
    assert page.run("document.getElementById('reply-where').textContent") == "1–10 of 20"
    page.run("document.getElementById('reply-on').click()")
    assert page.run("document.getElementById('reply-where').textContent") == "11–20 of 20"
    sort(page, "prompt")
    assert [row[0].split(":")[0] for row in page.run(REPLIES)] == [
        f"Question {i}" for i in range(10)
    ]
    page.run("document.getElementById('reply-search').focus()")
    page.type("QUESTION 17")
    (found,) = page.run(REPLIES)
    assert found[0].startswith("Question 17")
    shown = page.run("getComputedStyle(document.querySelector('#reply-rows .phone')).display")
    assert shown == ("inline" if width == 380 else "none")
    assert page.run(
        "document.querySelector('.side td:last-child').getBoundingClientRect().right"
    ) <= (380 if width == 380 else 1200)


def test_replies_by_the_gap_of_proxy_and_gold_and_by_seed(known, show):
    page = show(known)
    arms = ("sft", "arm-0", "arm-1", "arm-2")
    samples = {
        (arm, seed): read_jsonl(known.parent / f"{arm}-{seed}" / "samples.jsonl")
        for arm in arms
        for seed in (0, 1)
    }
    every = [row for rows in samples.values() for row in rows]
    z = lambda row, score: (
        (row[score] - mean(r[score] for r in every)) / pstdev(r[score] for r in every)
    )
    gaps = [
        max((z(samples[a, 1][i], "proxy") - z(samples[a, 1][i], "gold") for a in arms), key=abs)
        for i in range(20)
    ]
    page.run(
        "(() => { const e = document.getElementById('reply-seed'); e.value = '1'; e.onchange(); })()"
    )
    sort(page, "gap:1")
    order = sorted(range(20), key=lambda i: -abs(gaps[i]))
    rows = page.run(REPLIES)
    assert [int(row[0].split(":")[0].split()[1]) for row in rows] == order[:10]
    assert f"proxy − gold: {gaps[order[0]]:+.2f} sd".replace("-", "−") in rows[0][0]
    assert samples["arm-2", 1][order[0]]["response"] in rows[0][4]


def test_a_hundred_runs_answer_within_seconds(browser, tmp_path):
    """Counted in the page's own processor time, which other work on the machine does not lengthen."""
    results, run = many_runs(
        tmp_path, num_arms=10, num_seeds=10, num_prompts=400, num_updates=300, words=80
    )
    write_report(results, run)
    file = run.path / "report.html"
    assert file.stat().st_size < 10e6
    page = browser.page(380)
    page.call("Performance.enable", timeDomain="threadTicks")
    page.open(file)
    page.run(
        "(() => { const e = document.getElementById('reply-search'); e.value = 'soup'; e.oninput(); })()"
    )
    page.run("(() => { const e = document.getElementById('level'); e.value = 3; e.oninput(); })()")
    answered = page.seconds()
    page.run(DRAWN)
    drawn = page.seconds()
    assert answered < 3 and page.complaints() == []  # 2.2 s on the slowest CPU seen
    assert page.run("document.documentElement.scrollWidth") <= 380
    legend = page.run("document.querySelector('[data-plots=curve]').previousSibling.textContent")
    assert legend == "".join(f"arm-{i}" for i in range(10))  # once, not over every plot
    assert page.run(COUNT.format(".plot .legend")) == 0
    assert drawn < 5

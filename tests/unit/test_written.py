"""Forecast and landscape in a report: shown where they lie in the run directory and are about its models."""

import json

import pytest

from salsa.analysis.written import written
from salsa.report.page import write_report
from salsa.stages.directory import RunDirectory, Stage, report_key
from tests.many_runs import a_landscape, many_runs


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: test\n")
    run = RunDirectory(tmp_path)
    for name in ("sft[0]", "reward"):
        record = {"output": f"{name} as it is", "digest": "d"}
        run.finished.append(Stage(name, tmp_path, record, reused=True))
    return run


def put(run, **content):
    (run.path / "landscape.json").write_text(json.dumps(content))


def test_what_is_there_and_fits_is_shown(run):
    assert written(run, "landscape") is None
    put(run, models=["sft[0]"])  # of a version that did not record it
    assert written(run, "landscape") == {"models": ["sft[0]"]}
    put(run, made_from={"base": "any", "sft[0]": "sft[0] as it is", "sft[7]": "not of this report"})
    assert written(run, "landscape") is not None


def test_what_measured_other_models_is_left_out_and_said(run, capsys):
    put(run, made_from={"sft[0]": "sft[0] as it was"})
    assert written(run, "landscape") is None
    said = capsys.readouterr().err
    assert "landscape.json: made from another sft[0]" in said and "salsa landscape again" in said
    (run.path / "landscape.json").write_text("{")
    assert written(run, "landscape") is None
    assert "is no JSON" in capsys.readouterr().err


def test_a_new_landscape_makes_the_report_old(run):
    keys = {report_key(run), report_key(run, [{"models": [1]}]), report_key(run, [{"models": [2]}])}
    assert len(keys) == 3


def test_the_page_and_its_json_have_the_landscape(tmp_path):
    results, run = many_runs(tmp_path)
    write_report(results, run, landscape=a_landscape())
    page = (run.path / "report.html").read_text()
    assert "<h2>Between sft[0], sft[1]</h2>" in page and "<h3>Over the line</h3>" in page
    start = page.index("const figures = ") + len("const figures = ")
    figures = json.loads(page[start : page.index(";\n", start)])
    assert {"landscape-0", "landscape-1", "replies-proxy"} <= figures.keys()
    kept = json.loads((run.path / "report.json").read_text())["landscape"]
    assert kept == json.loads(json.dumps(a_landscape()))

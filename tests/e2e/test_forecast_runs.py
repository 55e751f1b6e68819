"""`salsa forecast`: killed and gone on with, the same numbers; in the report where the recipe asks for it."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.whole_run import salsa

pytestmark = pytest.mark.slow
ASKED = ["forecast.num_samples=40", "forecast.betas=[2.0,4.0,8.0,16.0,32.0]", "forecast.batch_prompts=2"]  # fmt: skip


def test_a_killed_forecast_goes_on_and_gives_the_same(inputs, finished, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for run in (straight, killed):
        shutil.copytree(finished, run)
    done = salsa(inputs, "forecast", "tiny.yaml", *ASKED, "-o", str(straight))
    assert done.returncode == 0, done.stderr
    assert "soup[0,1,2]  equal KL to own reference" in done.stdout
    command = [sys.executable, "-m", "salsa", "forecast", "tiny.yaml", *ASKED, "-o", str(killed)]
    process = subprocess.Popen(command, cwd=inputs, stderr=subprocess.DEVNULL)
    while not [f for f in killed.glob("stages/replies-*.partial/resume/*") if f.stat().st_size]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = salsa(inputs, "forecast", "tiny.yaml", *ASKED, "-o", str(killed))
    assert again.returncode == 0 and "going on from step" in again.stderr, again.stderr
    assert "rl ppo" not in again.stderr, "a forecast needs no RL"
    assert (killed / "forecast.json").read_text() == (straight / "forecast.json").read_text()
    made = json.loads((straight / "forecast.json").read_text())
    assert made["references"] == ["sft[0]", "soup", "soup[0,1,2]"]
    assert made["num_prompts"] == 40 and made["num_samples"] == 40
    assert set(made["frontiers"]["soup"][-1]["columns"]) == {
        "proxy", "gold", "length", "value", "kl_own", "kl_to_sft[0]", "kl_to_base",
    }  # fmt: skip
    assert made["frontiers"]["sft[0]"][-1]["columns"]["kl_to_sft[0]"]["mean"] == pytest.approx(
        made["frontiers"]["sft[0]"][-1]["columns"]["kl_own"]["mean"]
    )
    shown = salsa(inputs, "run", "tiny.yaml", *ASKED, "-o", str(straight))
    assert shown.returncode == 0, shown.stderr
    assert "replies soup: reused" in shown.stderr
    shown = json.loads((straight / "report.json").read_text())["forecast"]
    assert [row["arm"] for row in shown.pop("trained")] == ["ppo", "salsa", "salsa3"]
    assert shown == made
    assert "What training reached of it" in (straight / "report.html").read_text()
    assert "What each reference is worth before RL" in (straight / "report.html").read_text()
    plain = salsa(inputs, "run", "tiny.yaml", "-o", str(killed))  # its recipe asks for no forecast
    assert plain.returncode == 0, plain.stderr
    shown = json.loads((killed / "report.json").read_text())["forecast"]
    assert shown.pop("trained") and shown == made


def test_a_reward_model_on_disk_is_one_more_score(inputs, finished, tmp_path):
    """Here the run's own: its column is the proxy's."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (trained,) = (finished / "stages").glob("reward-*")
    second = f"eval.reward_models={{second: {trained}}}"
    done = salsa(inputs, "forecast", "tiny.yaml", *ASKED, second, "-o", str(run), "--force")
    assert done.returncode == 0, done.stderr
    made = json.loads((run / "forecast.json").read_text())
    assert made["scores"] == ["proxy", "gold", "second"]
    columns = made["frontiers"]["soup"][-1]["columns"]
    assert columns["second"] == columns["proxy"] != columns["gold"]
    taken = salsa(inputs, "check", "tiny.yaml", f"eval.reward_models={{gold: {trained}}}")
    assert taken.returncode == 2 and "reward_models.gold is a score already" in taken.stderr


def test_bad_candidates_and_too_few_samples_are_one_line(inputs, finished, tmp_path):
    for setting, message in (
        ("forecast.references=['sft[0]','sft[9]']", "needs sft[9], but there are 3 SFT models"),
        ("forecast.references=[soup,soup]", "names a model twice"),
        ("forecast.num_samples=8", "greater than or equal to 32"),
        ("forecast.beta=1", "unknown key 'forecast.beta'. Did you mean 'betas'?"),
    ):
        done = salsa(inputs, "forecast", "tiny.yaml", setting, "-o", str(tmp_path / "no"))
        assert done.returncode == 2 and message in done.stderr, done.stderr
    run = tmp_path / "few"
    shutil.copytree(finished, run)
    few = [*ASKED[:1], "forecast.betas=[1.0e-5,2.0e-5]", *ASKED[2:]]
    done = salsa(inputs, "forecast", "tiny.yaml", *few, "rl.kl_coef=0.05", "-o", str(run))
    assert done.returncode == 2 and "Set forecast.num_samples=" in done.stderr, done.stderr
    assert not (run / "forecast.json").exists()


def test_a_landscape_of_three_models(inputs, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    plane = ["landscape.models=['sft[0]','sft[1]','soup[0,1]']", "landscape.alphas=[0,1]"]
    plane.append("landscape.num_samples=2")
    done = salsa(inputs, "landscape", "tiny.yaml", *plane, "-o", str(run))
    assert done.returncode == 2 and "lie on one line" in done.stderr, done.stderr
    plane[0] = "landscape.models=['sft[0]','sft[1]','sft[2]']"
    done = salsa(inputs, "landscape", "tiny.yaml", *plane, "-o", str(run))
    assert done.returncode == 0, done.stderr
    made = json.loads((run / "landscape.json").read_text())
    assert [place["at"] for place in made["places"][:2]] == [[0.0, 0.0], [1.0, 0.0]]
    assert len(made["places"]) == 5 and made["columns"][:2] == ["proxy", "gold"]
    assert "heatmap" in (run / "landscape.html").read_text()
    assert {"base", "sft[0]", "sft[2]", "reward"} <= made["made_from"].keys()
    shown = salsa(inputs, "run", "tiny.yaml", "-o", str(run))  # whatever its own section asks for
    assert shown.returncode == 0 and "done in" not in shown.stderr, shown.stderr
    page = (run / "report.html").read_text()
    assert "<h2>Between sft[0], sft[1], sft[2]</h2>" in page and "heatmap" in page
    assert json.loads((run / "report.json").read_text())["landscape"]["models"] == made["models"]
    made["made_from"]["sft[1]"] = "0" * 64
    (run / "landscape.json").write_text(json.dumps(made))
    shown = salsa(inputs, "run", "tiny.yaml", "-o", str(run))
    assert "made from another sft[1] and left out of the report" in shown.stderr, shown.stderr
    assert "<h2>Between sft[0]" not in (run / "report.html").read_text()

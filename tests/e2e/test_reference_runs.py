"""One run with every kind of reference, through the command line, from SFT to the report."""

import json
from pathlib import Path

import pytest
import yaml

from tests.whole_run import salsa

pytestmark = pytest.mark.slow

ARMS = {
    "soup": "soup",
    "norm": "shrink(sft[0], base, soup)",
    "mixture": "mixture(0.25*sft[0], 0.75*soup)",
    "ema": "ema(soup, 0.1)",
    "reset": "reset(sft[0], 2, optimizer)",
    "none": "none",
}
WITH_LORA = ("soup", "ema", "reset")


def arms_of(kind: str) -> list[str]:
    return [name for name in ARMS if kind == "ppo" or name in WITH_LORA]


@pytest.fixture(scope="module", params=["ppo", "grpo-lora"])
def finished_run(request, inputs, tmp_path_factory) -> Path:
    recipe = yaml.safe_load((inputs / "tiny.yaml").read_text())
    recipe["sft"]["seeds"] = [0, 1]
    recipe["sft"]["epochs"] = 1
    recipe["reward"] |= {"epochs": 1, "seeds": [0, 1]}
    recipe["rl"] |= {
        "arms": {
            name: {"init": "sft[0]", "reference": ARMS[name]} for name in arms_of(request.param)
        },
        "num_updates": 4,
        "seeds": [0],
        "select": "best",
    }
    if request.param == "grpo-lora":
        recipe["rl"] |= {"algorithm": "grpo", "group_size": 4, "lora": {"rank": 2}}
        recipe["rl"] |= {"adaptive_kl": {"target": 1.0, "horizon": 50}}
    recipe["eval"]["baseline"] = "soup"
    name = f"references-{request.param}.yaml"
    (inputs / name).write_text(yaml.safe_dump(recipe))
    out = tmp_path_factory.mktemp(request.param) / "run"
    checked = salsa(inputs, "check", name)
    assert checked.returncode == 0 and "pulled towards ema(soup, 0.1)" in checked.stdout
    done = salsa(inputs, "run", name, "-o", str(out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def arms(finished_run) -> list[str]:
    return arms_of("ppo" if "ppo" in finished_run.parent.name else "grpo-lora")


def rows(run: Path, arm: str) -> list[dict]:
    (folder,) = (run / "stages").glob(f"rl-{arm}-seed-0-*")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_arm_is_trained_evaluated_and_reported(finished_run, arms):
    report = json.loads((finished_run / "report.json").read_text())
    assert set(report["arms"]) == {"sft", *arms}
    for arm in arms:
        assert report["arms"][arm]["mean"]["kl_reference"]["mean"] >= 0
        first, last = rows(finished_run, arm)[0], rows(finished_run, arm)[-1]
        for name in ("kl_to_base", "kl_to_sft[0]", "kl_to_sft[1]"):
            assert name in first and name in last
    assert (finished_run / "report.html").exists()


def test_references_that_start_at_the_policy_start_at_kl_0(finished_run, arms):
    for arm in arms:
        assert (rows(finished_run, arm)[0]["kl"] == 0.0) is (arm in ("reset", "none"))
        assert all((row["kl_coef"] == 0.0) is (arm == "none") for row in rows(finished_run, arm))
    # with adapters the reference is W + BA in one matrix, the policy W and BA apart: bf16 rounds them differently
    assert rows(finished_run, "reset")[2]["kl"] == pytest.approx(
        0, abs=0 if "none" in arms else 0.05
    )


def test_moving_references_are_written_and_the_rest_is_not(finished_run, arms):
    for arm in arms:
        (folder,) = (finished_run / "stages").glob(f"rl-{arm}-seed-0-*")
        assert (folder / "reference" / "model.safetensors").exists() is (arm in ("ema", "reset"))
        assert (folder / "critic").exists() is ("ppo" in finished_run.parent.name)
        assert not any("lora" in line for line in (folder / "config.json").read_text().splitlines())


def test_the_reward_is_a_soup_of_two(finished_run):
    (soup,) = (finished_run / "stages").glob("reward-soup-*")
    assert len(json.loads((soup / "soup.json").read_text())["ingredients"]) == 2


def test_kl_to_a_mixture_is_the_weighted_sum(finished_run, arms):
    if "mixture" not in arms:
        return
    (folder,) = (finished_run / "stages").glob("eval-mixture-seed-0-*")
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        expected = 0.25 * row["kl_reference[0]"] + 0.75 * row["kl_reference[1]"]
        assert row["kl_reference"] == pytest.approx(expected, rel=1e-4, abs=1e-6)

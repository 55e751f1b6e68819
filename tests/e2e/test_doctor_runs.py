"""`salsa doctor` on whole runs of a tiny model: what it says of a healthy one, and of ones with a planted fault."""

import json
import re
from pathlib import Path

import pytest

from salsa import rl as salsa_rl
from salsa.config import Recipe
from salsa.doctor import examine, replay
from salsa.doctor.examine import examine_run
from salsa.doctor.files import RunFiles
from salsa.errors import WorkFailed
from salsa.pipeline import run_recipe
from salsa.stages.directory import RunDirectory
from tests.faults.bench import link_unaffected, table
from tests.faults.kinds import FAULTS
from tests.whole_run import salsa

pytestmark = pytest.mark.slow
SMALL = (
    "rl.seeds=[0]", "rl.num_updates=3", "rl.kl_coef=0.5", "rl.temperature=0.7", "model.precision=fp32",
    'rl.arms={ppo: {init: "sft[0]", reference: "sft[0]"}, salsa: {init: "sft[0]", reference: soup}}',
)  # fmt: skip
PLANTED = [
    "reward: shifted by one row", "reward: constant", "rollout: EOS masked out", "rollout: pad = eos miscounted",
    "rollout: temperature in sampling only", "rollout: bf16 sampler, fp32 trainer", "rollout: stale weights",
    "kl: sign turned round", "kl: stale reference", "kl: reference is the policy", "critic: value one position late",
    "critic: never trained", "advantages: score one token early", "advantages: turned round",
    "optimisation: policy never steps", "evaluation: scores shifted by one row",
]  # fmt: skip


@pytest.fixture(scope="module")
def healthy(finished, inputs, tmp_path_factory) -> Path:
    """A run in fp32 up to its evaluation."""
    run = tmp_path_factory.mktemp("doctor") / "healthy"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        run_recipe(Recipe.load("tiny.yaml", SMALL), out=run, until="eval")
    return run


def test_a_healthy_loop_is_sound(healthy, inputs, monkeypatch):
    """From the rollout on; the tiny recipe's data are letters drawn at random, which the gates before may mind."""
    monkeypatch.chdir(inputs)
    found = examine_run(healthy)
    loop = [f for f in found.findings if f.stage in ("rollout", "kl", "critic", "advantages")]
    gates = {f.gate for f in loop}
    assert {"log-probabilities", "reference in use", "start", "recursion", "score's place"} <= gates
    assert [f.says for f in found.findings if f.verdict == "faulty"] == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_put_where_it_is(name, healthy, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    (fault,) = (one for one in FAULTS if one.name == name)
    link_unaffected(healthy / "stages", tmp_path / "run" / "stages", fault.begins)
    with fault.planted():
        run_recipe(Recipe.load("tiny.yaml", SMALL), out=tmp_path / "run", until="eval")
    found = examine_run(tmp_path / "run")
    assert (found.verdict, found.culprit) == ("faulty", fault.stage), [
        (f.stage, f.gate, f.says) for f in found.findings if f.verdict == "faulty"
    ]


def test_a_run_that_stopped_is_looked_at_as_far_as_it_got(healthy, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    (fault,) = (one for one in FAULTS if one.name == "reward: shifted by one row")
    link_unaffected(healthy / "stages", tmp_path / "run" / "stages", fault.begins)
    real = salsa_rl.advance

    def stops(models, progress, *others):
        if progress.update == 1:
            raise WorkFailed("stopped on purpose")
        return real(models, progress, *others)

    monkeypatch.setattr(salsa_rl, "advance", stops)
    with fault.planted(), pytest.raises(WorkFailed, match="on purpose"):
        run_recipe(Recipe.load("tiny.yaml", SMALL), out=tmp_path / "run", until="eval")
    found = examine_run(tmp_path / "run")
    assert (found.verdict, found.culprit) == ("faulty", fault.stage)
    assert any("ppo seed 0 had not come to: not finished" in one for one in found.not_measured)


def test_the_end_of_a_run_loads_no_large_model(healthy, inputs, monkeypatch):
    """What the files say is judged all the same; `salsa doctor RUN` asks for more."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(examine, "SMALL", 1)
    for loader in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(replay, loader, None)  # whoever asks it for a model gets an error
    run = RunDirectory(healthy)
    run.finished += RunFiles.open(healthy).stages.values()
    found = examine.diagnosed(run)
    assert any("needs a forward pass: the models are large" in one for one in found["not_measured"])
    assert {f["stage"] for f in found["findings"]} >= {"data", "rollout", "kl", "evaluation"}


def test_at_the_terminal(finished, inputs):
    done = salsa(inputs, "doctor", "runs/tiny", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (3 if found["verdict"] == "faulty" else 0), done.stderr
    report = json.loads((finished / "report.json").read_text())
    assert report["doctor"] == found, "the report ends with the same"
    page = (finished / "report.html").read_text()
    assert 'id="doctor"' in page and "Is something broken?" in page
    notable = [f for f in found["findings"] if f["verdict"] != "sound"]
    assert page.partition('id="doctor"')[0].count("Do this:") == len(notable[:6])
    text = salsa(inputs, "doctor", "runs/tiny")
    assert text.returncode == done.returncode
    assert found["headline"] in text.stdout and "Not looked at: " in text.stdout


def test_bad_input(inputs):
    for arguments, message in (
        (("nowhere",), "holds no run"),
        (("tiny.yaml",), "is a file. Give a run directory, or --before tiny.yaml"),
        (("runs/tiny", "rl.kl_coef=1"), "Overrides go with --before"),
    ):
        done = salsa(inputs, "doctor", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_the_how_to(finished, inputs, repository):
    """Every command of docs/how-to/doctor.md, on the tiny recipe."""
    text = (repository / "docs" / "how-to" / "doctor.md").read_text()
    commands = [line.split("#")[0].split() for line in re.findall(r"^salsa .*$", text, flags=re.M)]
    assert len(commands) >= 3
    for words in commands:
        names = {"runs/quickstart": "runs/tiny", "recipes/quickstart.yaml": "tiny.yaml"}
        done = salsa(inputs, *(names.get(word, word) for word in words[1:]))
        assert done.returncode in (0, 3), (words, done.stderr)
        assert done.stdout and "Traceback" not in done.stderr


def test_the_confusion_table():
    """Made by hand: one fault put right, one at another stage, a healthy run, and one that is called faulty."""
    verdict = lambda kind, stage, culprit, word: {
        "kind": kind, "stage": stage, "culprit": culprit, "verdict": word,
        "findings": [{"stage": culprit, "gate": "g", "verdict": word, "says": "s"}],
    }  # fmt: skip
    text = table(
        [
            verdict("a", "kl", "kl", "faulty"),
            verdict("b", "kl", "data", "faulty"),
            verdict("healthy 0", None, None, "sound"),
            verdict("healthy 1", None, "sft", "faulty"),
        ]
    )
    assert text.startswith(
        "1 of 2 faults are put where they are; 1 of 2 healthy runs are called faulty."
    )
    assert "| kl (2) | 1 |  |  |  | 1 |" in text and "**(not its stage)**" in text
    assert "- sft, g: faulty: 1" in text

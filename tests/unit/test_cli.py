"""The command line as people meet it: its words, its exit codes, what it leaves alone."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest


def salsa(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "salsa", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


def test_help_names_every_command():
    done = salsa("--help")
    assert done.returncode == 0
    for command in ("run", "check", "sft", "soup", "reward", "rl", "eval", "report"):
        assert f"  {command} " in done.stdout


def test_check_prints_the_arithmetic(repository):
    done = salsa("check", repository / "recipes" / "quickstart.yaml")
    assert done.returncode == 0, done.stderr
    assert "quickstart: sound" in done.stdout and "pulled towards soup" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere.yaml"], "error: nowhere.yaml: no such recipe."),
        (
            ["run", "{recipe}", "rl.kl_coeff=1"],
            "unknown key 'rl.kl_coeff'. Did you mean 'kl_coef'?",
        ),
        pytest.param(
            ["run", "{recipe}", "sft.dataset=gone.jsonl", "-o", "out"],
            "gone.jsonl: no such file.",
            marks=pytest.mark.slow,
        ),
        (
            ["soup", "a/b", "c/d", "-o", "out"],
            "a/b: neither a directory here nor a model that the hub gives out",
        ),
        (
            ["soup", "x", "y", "-o", "out", "--weights", "half"],
            "--weights 'half': write numbers with commas",
        ),
        (["soup"], "Missing argument"),
        (["dance"], "No such command 'dance'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, repository, tmp_path):
    recipe = repository / "recipes" / "quickstart.yaml"
    done = salsa(*[a.format(recipe=recipe) for a in arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (
        not list((tmp_path / "out" / "stages").glob("*")) if (tmp_path / "out").exists() else True
    )


def test_debug_shows_the_traceback(tmp_path):
    done = salsa("check", "nowhere.yaml", "--debug", cwd=tmp_path)
    assert "Traceback" in done.stderr and done.returncode == 1


def test_soup_command(make_checkpoint, tmp_path):
    a, b = make_checkpoint("llama", 0).path, make_checkpoint("llama", 1).path
    done = salsa("soup", a, b, "-o", tmp_path / "soup", "--weights", "0.25,0.75")
    assert done.returncode == 0 and "sha256" in done.stdout
    again = salsa("soup", a, b, "-o", tmp_path / "soup")
    assert again.returncode == 2 and "exists" in again.stderr


def started(tmp_path, *arguments):
    """The command as a process that signals reach, also where the tests run as a background job."""
    return subprocess.Popen(
        [sys.executable, "-m", "salsa", *map(str, arguments)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "400"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_says_how_to_go_on(number, code, repository, tmp_path):
    process = started(tmp_path, "run", repository / "recipes" / "quickstart.yaml", "-o", "out")
    while not list((tmp_path / "out").glob("stages/sft-0*.partial")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(number)
    _, output = process.communicate(timeout=60)
    assert process.returncode == code
    assert "stopped; finished work is kept. Go on with: salsa run" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("module", ["salsa.stopping", "typer", "salsa.config"])
def test_a_signal_while_python_imports_gives_no_traceback(
    number, code, module, repository, tmp_path
):
    """The signal comes the moment a module is looked for: before the command line is there."""
    program = f"""
import os, signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and name != "salsa.stopping":
            os.kill(os.getpid(), {int(number)})
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Watch())
sys.argv = ["salsa", "check", {str(repository / "recipes" / "quickstart.yaml")!r}]
from salsa.__main__ import main
if {module!r} == "salsa.stopping":
    import threading
    threading.Timer(0.02, lambda: os.kill(os.getpid(), {int(number)})).start()
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (
        done.stderr.startswith("stopped; finished work is kept") and "Traceback" not in done.stderr
    )


def test_version():
    from importlib.metadata import version

    assert salsa("--version").stdout == f"salsa-rlhf {version('salsa-rlhf')}\n"


def test_a_missing_recipe_where_there_is_none_says_what_to_give(tmp_path):
    done = salsa("check", "NO_SUCH.yaml", cwd=tmp_path)
    assert done.stderr == "error: NO_SUCH.yaml: no such recipe. Give the path of a YAML file.\n"


def test_old_keys_are_told_in_a_line(tmp_path, repository):
    text = (repository / "recipes" / "quickstart.yaml").read_text()
    (tmp_path / "old.yaml").write_text(text.replace('kl_to: ["sft[0]", base]', "anchor: base"))
    done = salsa("check", "old.yaml", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "note: old.yaml: eval.anchor is now eval.kl_to: [base]\n"


def test_directories_that_cannot_be_written_are_told(repository, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = salsa("run", repository / "recipes" / "quickstart.yaml", "-o", tmp_path / "file" / "run")
    assert done.returncode == 2 and "a file is in the way" in done.stderr
    assert len(done.stderr.splitlines()) == 1


WITHOUT_ROOTS_RIGHTS = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
"""Root may read and write everything, but for a process that has given these two rights away."""


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root needs setpriv (util-linux)"
)
@pytest.mark.parametrize("what", ["run directory", "data", "model", "callable", "soup", "recipe"])
@pytest.mark.slow
def test_permissions_that_are_missing_are_told(what, repository, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    for name, text in {
        "config.json": "{}", "rows.jsonl": '{"prompt": "a", "completion": "b"}', "r.yaml": "name: x",
        "secret.py": "def score(prompts, responses): ...",
    }.items():  # fmt: skip
        (closed / name).write_text(text)
        (closed / name).chmod(0)
    recipe = str(repository / "recipes" / "quickstart.yaml")
    run = ["sft", recipe, "-o", str(tmp_path / "run")]
    arguments = {
        "run directory": ["sft", recipe, "-o", str(closed / "run")],
        "data": [*run, f"sft.dataset={closed}/rows.jsonl"],
        "model": [*run, f"model.path={closed}"],
        "callable": [*run, "eval.scores={gold: {call: 'secret:score'}}"],
        "soup": ["soup", str(closed), str(tmp_path / "other"), "-o", str(tmp_path / "soup")],
        "recipe": ["check", str(closed / "r.yaml")],
    }[what]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    if what in ("run directory", "model"):
        closed.chmod(0o500 if what == "run directory" else 0)
    prefix = WITHOUT_ROOTS_RIGHTS if os.geteuid() == 0 else []
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "salsa", *arguments],
        capture_output=True, text=True, timeout=100, cwd=closed if what == "callable" else tmp_path,
    )  # fmt: skip
    closed.chmod(0o700)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "ermission denied" in last or "is not readable" in last, done.stderr
    assert "Traceback" not in done.stderr
    assert "defect" not in done.stderr

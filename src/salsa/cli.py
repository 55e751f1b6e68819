"""The command line: thin, and it imports no torch until there is work to do.

Exit codes: 0 ok, 1 the work failed, 2 bad input, 3 `salsa doctor` found a fault, 130 stopped with Ctrl-C, 143 by
SIGTERM.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

app = typer.Typer(
    help="RLHF with a model soup as its reference: SFT×N → soup → reward → PPO → evaluation → report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_INTERRUPTED = 130
_UsageError: Any = typer.BadParameter.__mro__[1]  # click's

RecipeFile = Annotated[
    Path, Argument(metavar="RECIPE", help="YAML file, e.g. recipes/quickstart.yaml")
]
Overrides = Annotated[
    list[str] | None, Argument(metavar="[KEY=VALUE]…", help="e.g. rl.kl_coef=0.1")
]
Out = Annotated[Path | None, Option("--out", "-o", help="run directory; runs/<name> if not given")]
Force = Annotated[bool, Option("--force", help="replace what is there")]
Jobs = Annotated[int | None, Option(help="independent stages to run at once", min=1)]
Verify = Annotated[bool, Option("--verify", help="hash all that is used again")]
Scale = Annotated[
    str | None, Option(help="tiny: random models, local rows, few updates; to try a recipe")
]
Debug = Annotated[bool, Option("--debug", help="show the traceback of an error")]


def _stage_command(until: str) -> Callable[..., None]:
    """A command that runs the pipeline up to a stage."""

    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        out: Out = None,
        jobs: Jobs = None,
        verify: Verify = False,
        force: Force = False,
        scale: Scale = None,
        debug: Debug = False,
    ) -> None:
        from salsa.config import Recipe

        loaded = Recipe.load(recipe, overrides or ())
        if scale is not None:
            out = out or Path("runs") / f"{loaded.name}-{scale}"
            loaded = _scaled(loaded, scale, out)
        from salsa.pipeline import run_recipe

        run = run_recipe(loaded, out=out, until=until, force=force, jobs=jobs, verify=verify)  # type: ignore[arg-type]
        if until == "forecast":
            from salsa.report.forecast import read_lines

            typer.echo("\n".join(read_lines(run)))

    return command


def _scaled(recipe: Any, scale: str, out: Path) -> Any:
    """The recipe made tiny, and on the terminal what that changed."""
    from salsa.errors import ConfigError

    if scale != "tiny":
        raise ConfigError(
            f"--scale {scale!r}: there is one other scale than the recipe's own. Use tiny."
        )
    from salsa.scale import tiny

    recipe, changes = tiny(recipe, out)
    typer.echo(
        "\n".join(["scale tiny: random weights and rows made here; changed", *changes]), err=True
    )
    return recipe


_STAGE_COMMANDS = {
    "run": ("report", "Run the whole recipe; run it again to go on where it stopped."),
    "sft": ("sft", "Run the recipe's SFT, once per seed."),
    "reward": ("reward", "Train the recipe's reward model (and what it needs)."),
    "forecast": ("forecast", "Say what each reference is worth at the optimum, before any RL."),
    "landscape": ("landscape", "Measure the line between SFT models, or the plane through three."),
    "rl": ("rl", "Run RL for every arm and seed (and what it needs)."),
}
for _name, (_until, _help) in _STAGE_COMMANDS.items():
    app.command(_name, help=_help)(_stage_command(_until))


@app.command()
def report(
    what: Annotated[
        list[str],
        Argument(metavar="RECIPE [KEY=VALUE]… | RUN RUN…", help="a recipe; or finished runs"),
    ],
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="run directory; or the page that compares: comparison.html"),
    ] = None,
    jobs: Jobs = None,
    verify: Verify = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a recipe's report (and what it needs), or one page that compares finished runs."""
    if what[0].endswith((".yaml", ".yml")):
        _stage_command("report")(Path(what[0]), what[1:], out, jobs, verify, force)
        return
    from salsa.report.compare import compare_runs

    page = out or Path("comparison.html")
    compare_runs([Path(one) for one in what], page, force=force)
    typer.echo(f"{page}: written")


_EvalTarget = Annotated[
    list[str] | None,
    Argument(
        metavar="RECIPE [KEY=VALUE]… | [NAME=]DIRECTORY… | RUN",
        help="a recipe; or checkpoints, NAME again for a further seed; or a finished run's directory",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"salsa-rlhf {version('salsa-rlhf')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """RLHF with a model soup as its reference: SFT×N → soup → reward → PPO → evaluation → report."""


@app.command("eval")
def evaluate(
    what: _EvalTarget = None,
    out: Out = None,
    mt_bench: Annotated[
        Path | None, Option(help="directory with FastChat's question.jsonl, …")
    ] = None,
    arena_hard: Annotated[
        Path | None, Option(help="directory with question.jsonl and judge_config.yaml")
    ] = None,
    prompts: Annotated[str | None, Option(help="held-out prompts: file or data set")] = None,
    judge: Annotated[
        str | None, Option(help="URL, model directory, or judgments.jsonl to replay")
    ] = None,
    judge_model: Annotated[str | None, Option(help="the endpoint's model")] = None,
    reward: Annotated[
        list[str] | None, Option(help="NAME=DIRECTORY or NAME=module:function; repeatable")
    ] = None,
    kl_to: Annotated[str | None, Option(help="the model that KL is measured to")] = None,
    baseline: Annotated[str | None, Option(help="arm to compare with; else the first")] = None,
    spec: Annotated[Path | None, Option(help="YAML file with all of this")] = None,
    settings: Annotated[
        list[str] | None, Option("--set", help="key=value, e.g. judge.concurrency=32")
    ] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Evaluate a recipe's arms, or any checkpoints: answers, rewards, KL, judges, and a report."""
    from salsa.errors import ConfigError
    from salsa.evaluate.spec import spec_of

    options: dict[str, Any] = {
        "spec": spec, "prompts": prompts, "mt_bench": mt_bench, "arena_hard": arena_hard, "judge": judge,
        "judge_model": judge_model, "rewards": reward or (), "kl_to": kl_to, "baseline": baseline,
        "settings": settings or (),
    }  # fmt: skip
    if what and what[0].endswith((".yaml", ".yml")):
        if any(options.values()):
            raise ConfigError(
                f"{what[0]} is a recipe, and these options are for checkpoints. Run it, then give its run directory: "
                "salsa eval runs/NAME --judge …"
            )
        _stage_command("eval")(Path(what[0]), what[1:], out, force=force)
        return
    asked = spec_of(what or (), **options)
    from salsa.evaluate.checkpoints import evaluate_checkpoints

    evaluate_checkpoints(asked, out or Path("runs") / asked.name, force=force)


@app.command()
def sweep(
    file: Annotated[Path, Argument(metavar="SWEEP", help="YAML file: recipe and grid")],
    overrides: Overrides = None,
    out: Out = None,
    only: Annotated[str, Option(help="pattern of the points to finish, e.g. 'pair-0*'")] = "*",
    dry_run: Annotated[
        bool, Option("--dry-run", help="list the points, jobs and hours that are left")
    ] = False,
    jobs: Jobs = None,
    debug: Debug = False,
) -> None:
    """Run a recipe over a grid, shared stages once; tables, plots and verdicts over independent clusters."""
    from salsa.analysis.sweep import (
        keeper_of_stages,
        plan_lines,
        points_of,
        read_lines,
        run_sweep,
    )
    from salsa.config.sweep import SweepConfig

    config = SweepConfig.load(file, overrides or ())
    directory = out or Path("runs") / config.name
    from salsa.pipeline import remaining, run_recipe

    if dry_run:
        points = points_of(config, directory, only)
        keeper = keeper_of_stages(config, directory)
        typer.echo("\n".join(plan_lines(points, keeper, config.until, remaining)))
        return

    run_sweep(config, directory, run_recipe, only=only, jobs=jobs)
    typer.echo("\n".join(read_lines(directory)))


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: Annotated[
        str | None, Option(help="plan for it: 8xA100-80GB, 4xH100-80GB, 1x24GB, cpu:2, …")
    ] = None,
    assume: Annotated[
        list[str] | None, Option(help="key=number, e.g. price=1.2; repeatable, with --on")
    ] = None,
    debug: Debug = False,
) -> None:
    """Validate a recipe and print its arithmetic; with --on also memory, hours and cost. No torch."""
    from salsa.config import Recipe
    from salsa.errors import ConfigError
    from salsa.planner import hardware_of, on_hardware, plan

    if assume and on is None:
        raise ConfigError(
            f"--assume {assume[0]} belongs to --on. Add --on 8xA100-80GB or the like."
        )
    hardware = hardware_of(on, assume or ()) if on is not None else None
    loaded = Recipe.load(recipe, overrides or ())
    typer.echo(plan(loaded))
    if hardware is not None:
        typer.echo("\n" + on_hardware(loaded, hardware))


@app.command()
def verify(
    run: Annotated[Path, Argument(metavar="RUN", help="run directory, e.g. runs/quickstart")],
    key: Annotated[
        Path | None, Option(help="file with the key that the stages were signed with")
    ] = None,
    debug: Debug = False,
) -> None:
    """Recompute a run's digests and the chain of its inputs; with --key, check who signed it."""
    from salsa.errors import CheckpointError
    from salsa.stages.provenance import read_key
    from salsa.stages.provenance import verify as verified

    found = verified(run, None if key is None else read_key(key))
    typer.echo("\n".join(found.lines()))
    if found.problems:
        raise CheckpointError(
            f"{run}: {len(found.problems)} problems, see above. Do not rely on it."
        )


@app.command()
def chat(
    what: Annotated[str, Argument(metavar="MODEL|RUN", help="model or run directory, hub name")],
    arm: Annotated[
        list[str] | None, Option(help="of a run: an arm, sft[0], soup, …; again for side by side")
    ] = None,
    seed: Annotated[
        int | None, Option(help="of a run: which RL seed; its first if not given")
    ] = None,
    samples: Annotated[int, Option(help="replies to each message", min=1)] = 1,
    temperature: Annotated[
        float | None, Option(help="0 takes the likeliest; the run's, else 0.7", min=0)
    ] = None,
    max_new_tokens: Annotated[
        int | None, Option(help="longest reply; the run's, else 256", min=1)
    ] = None,
    system: Annotated[str | None, Option(help="system message")] = None,
    debug: Debug = False,
) -> None:
    """Talk to a model, or to arms of a run side by side; reads standard input, a message a line."""
    from salsa.chat import chat as start

    start(
        what, arms=arm or (), seed=seed, samples=samples, temperature=temperature,
        max_new_tokens=max_new_tokens, system=system,
    )  # fmt: skip


@app.command()
def init(
    file: Annotated[Path, Argument(metavar="[RECIPE]", help="file to make")] = Path("recipe.yaml"),
    model: Annotated[str | None, Option(help="hub name, directory, or embedded")] = None,
    sft: Annotated[
        str | None, Option(help="SFT data: file, hub name or module:function; or checkpoints A,B")
    ] = None,
    reward: Annotated[
        str | None, Option(help="preference pairs, or a function module:score")
    ] = None,
    prompts: Annotated[str | None, Option(help="prompts for RL")] = None,
    heldout: Annotated[str | None, Option(help="held-out prompts")] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a commented recipe: asks five questions, or takes the answers as options."""
    from salsa.errors import ConfigError
    from salsa.starter import answers, write_recipe

    given = {"model": model, "sft": sft, "reward": reward, "prompts": prompts, "heldout": heldout}

    def ask(question: str, default: str) -> str:
        try:
            return str(typer.prompt(question, default=default))
        except typer.Abort:
            if sys.stdin.isatty():
                raise
            missing = ", ".join(f"--{name}" for name, value in given.items() if value is None)
            raise ConfigError(f"init: there is nobody to ask. Give {missing}.") from None

    for line in write_recipe(file, answers(given, ask), force=force):
        typer.echo(f"note: {line}", err=True)
    typer.echo(f"{file}: written. Next: salsa check {file}; salsa run {file}")


@app.command()
def doctor(
    what: Annotated[
        Path, Argument(metavar="RUN | RECIPE", help="run directory; with --before a recipe")
    ],
    overrides: Overrides = None,
    before: Annotated[
        bool, Option("--before", help="look at a recipe's inputs, before anything is trained")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="print JSON")] = False,
    debug: Debug = False,
) -> None:
    """Say which stage of a run is at fault: a verdict per stage, the evidence, what to do. Exit code 3 if faulty."""
    from salsa.doctor.terminal import run_doctor

    if code := run_doctor(what, overrides or (), before=before, as_json=as_json):
        raise typer.Exit(code)


@app.command()
def soup(
    ingredients: Annotated[
        list[str], Argument(metavar="A B [C…]", help="model directories or hub names")
    ],
    out: Annotated[Path | None, Option("--out", "-o", help="directory to make")] = None,
    weights: Annotated[
        str | None, Option(help="one an ingredient, e.g. 0.7,0.3; uniform if not given")
    ] = None,
    method: Annotated[
        str, Option(help="linear, greedy, wise, slerp, model_stock or interpolate")
    ] = "linear",
    base: Annotated[
        str | None, Option(help="what they were tuned from; wise, slerp and model_stock need it")
    ] = None,
    alpha: Annotated[
        float | None, Option(help="wise: share of the soup, the rest is the base")
    ] = None,
    score: Annotated[
        str | None,
        Option(help="greedy: command that prints a model's score last; {} is its directory"),
    ] = None,
    points: Annotated[
        str | None, Option(help="interpolate: where between A (0) and B (1), e.g. 0,0.5,1")
    ] = None,
    dtype: Annotated[str, Option(help="auto, float32, bfloat16, float16 or float64")] = "auto",
    heads: Annotated[
        str | None, Option(help="score or value heads: average, drop or keep-from-I")
    ] = None,
    take_from: Annotated[
        int | None, Option(help="number of the ingredient whose settings win, from 0")
    ] = None,
    normalize: Annotated[bool, Option(help="scale the weights to sum to 1")] = False,
    extrapolate: Annotated[
        bool, Option(help="allow negative weights and sums other than 1")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="measure and print, write nothing")] = False,
    as_json: Annotated[bool, Option("--json", help="print soup.json instead")] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Average checkpoints into one: an ordinary Hugging Face directory."""
    options = {
        k: v for k, v in locals().items() if k != "debug"
    }  # what was asked, before any other local
    from salsa.soup.terminal import run_soup

    run_soup(**options)


def main() -> None:
    """Run a command: one line for an error, the traceback with --debug."""
    from salsa.errors import SalsaError, WorkFailed
    from salsa.runtime.launch import leading

    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        with leading() as leads:  # under torchrun the other processes do their part of its calls
            code = app(standalone_mode=False) if leads else 0
        if code == _INTERRUPTED:  # typer turns Ctrl-C into an exit code
            raise KeyboardInterrupt
        sys.exit(code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _UsageError as error:
        message, code = f"{error.format_message()} See salsa --help.", 2
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, SalsaError):
            message, code = str(error), 1 if isinstance(error, WorkFailed) else 2
        elif isinstance(error, PermissionError):
            todo = "cannot be read or written (permission denied). Mend that, or name another."
            message, code = f"{error.filename}: {todo}", 2
        else:
            why = "(a defect or a broken machine: --debug shows where)"
            message, code = f"{type(error).__name__}: {error} {why}", 1
    print(" ".join(f"error: {message}".split()), file=sys.stderr)
    sys.exit(code)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any
) -> None:
    """Old names in one plain line; libraries' warnings as Python shows them."""
    if category is FutureWarning and "salsa" in filename:
        print(f"note: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr, end="")

"""`salsa soup` on a terminal: words into options, a record into a table."""

import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from salsa.artifacts import Checkpoint
from salsa.errors import ConfigError, WorkFailed
from salsa.soup import interpolate, make_soup, measure_soup
from salsa.soup.blend import Progress

_log = logging.getLogger("salsa.soup")
_PROGRESS_AFTER = 200_000_000
"""Elements from which a progress bar is worth its line."""


def run_soup(
    ingredients: Sequence[str],
    *,
    out: Path | None,
    points: str | None,
    as_json: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Do what was typed, lists still as text, and print what came of it; options as of `make_soup`."""
    options["weights"] = _numbers("--weights", options["weights"])
    if options["score"] is not None:
        options["score"] = partial(command_score, options["score"])
    if (options["method"] == "interpolate") != (points is not None):
        raise ConfigError("--points belongs to --method interpolate, which needs it.")
    if out is None and not dry_run:
        raise ConfigError("Missing option --out: the directory to make (or --dry-run).")
    if (places := _numbers("--points", points)) is not None:
        no_use = {k: options.pop(k) for k in ("weights", "alpha", "score", "normalize")}
        no_use["dry-run"] = dry_run
        unused = [f"--{k}" for k, v in no_use.items() if v is not None and v is not False]
        if len(ingredients) != 2 or unused or out is None:
            but = f", not {', '.join(unused)}" if unused else ""
            raise ConfigError(f"--method interpolate takes two models and --points{but}.")
        del options["method"]
        made = interpolate(*ingredients, points=places, out=out, **options)
        if as_json:
            print(json.dumps([_record(one) for one in made], indent=1))
        else:
            print("\n".join(f"{one.path}  sha256 {one.digest[:12]}" for one in made))
        return
    with _progress() as progress:
        if out is None or dry_run:
            record = measure_soup(ingredients, progress=progress, **options)
            for warning in record["warnings"]:
                _log.warning("soup: %s", warning)  # as what is written does
        else:
            record = _record(make_soup(ingredients, out=out, progress=progress, **options))
    if as_json:
        print(json.dumps(record, indent=1))
        return
    _show(record)
    if not dry_run:
        print(f"{out}  sha256 {record['sha256'][:12]}")


def _record(made: Checkpoint) -> dict[str, Any]:
    return json.loads((made.path / "soup.json").read_text(encoding="utf-8"))


def command_score(command: str, path: Path) -> float:
    """A score from a command: `{}` (or the end) becomes the directory, the last line printed is the number.

    Raises:
        WorkFailed: the command fails, or its last line is no number.
    """
    words = shlex.split(command) + ([] if "{}" in command else ["{}"])
    words = [word.replace("{}", str(path)) for word in words]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise WorkFailed(f"--score: {shlex.join(words)} ended with code {done.returncode}.")
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    try:
        return float(last)
    except ValueError:
        raise WorkFailed(
            f"--score: {shlex.join(words)} printed {last!r} last, which is no number."
        ) from None


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(w) for w in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: write numbers with commas, e.g. 0.7,0.3") from None


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar for what takes long, if somebody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    columns = ("averaging", BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("averaging", total=None, visible=False)
        yield lambda done, total: bar.update(
            task, completed=done, total=total, visible=total > _PROGRESS_AFTER
        )


def _show(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    def table(
        *columns: str | Column, numbers: Iterable[str], rows: Iterable[Iterable[str]]
    ) -> None:
        right = [Column(name, justify="right") for name in numbers]
        made = Table(*columns, *right, box=None, pad_edge=False, header_style="dim")
        for row in rows:
            made.add_row(*row)
        console.print(made)

    console = Console(highlight=False)
    diagnostics, ingredients = record["diagnostics"], record["ingredients"]
    of = "delta" if diagnostics["of"] == "deltas" else "weights"
    console.print(f"soup of {len(ingredients)}, {record['method']}, {record['dtype']}")
    rows = [
        [str(i), one["path"], f"{one['weight']:.4g}", *map(_short, (norm, *cosines))]
        for i, (one, norm, cosines) in enumerate(
            zip(ingredients, diagnostics["norms"], diagnostics["cosines"], strict=True)
        )
    ]
    table(
        "",
        Column("ingredient", overflow="fold"),
        numbers=["weight", f"norm of {of}", *(f"cos to {i}" for i in range(len(ingredients)))],
        rows=[*rows, ["", "soup", "", _short(diagnostics["soup_norm"])]],
    )
    figures = ("norm", "cosine", "relative_distance", "soup_norm_ratio")
    table(
        "layer",
        numbers=("elements", "mean norm", "mean cos", "mean distance", "soup / mean norm"),
        rows=(
            [row["layer"], f"{row['elements']:,}", *(_short(row[name]) for name in figures)]
            for row in diagnostics["layers"]
        ),
    )
    loss = diagnostics["bf16_rounding"]
    if (share := loss["share_of_delta"]) is not None:
        size = f"{share:.1%}" if share < 1 else f"all: {share:.3g} times the size"
        console.print(f"bf16 would lose {size} of the delta ({loss['delta']})")
    for step in record.get("greedy", ()):
        verdict = "kept" if step["kept"] else "left out"
        console.print(f"greedy: {step['ingredient']} {verdict}, score {step['soup']:.6g}")


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"

"""`salsa soup` on a terminal: words into options, a record into a table."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salsa.errors import ConfigError, WorkFailed
from salsa.soup import Score, interpolate, make_soup, measure_soup
from salsa.soup.blend import Progress

_PROGRESS_AFTER = 200_000_000
"""Elements from which a progress bar is worth its line."""


@dataclass(frozen=True)
class SoupCommand:
    """What was typed; lists still as text."""

    ingredients: Sequence[str]
    out: Path | None
    points: str | None
    as_json: bool
    dry_run: bool
    options: Mapping[str, Any]

    def run(self) -> None:
        """Do it and print what came of it."""
        options = dict(self.options)
        options["weights"] = _numbers("--weights", options["weights"])
        if options["score"] is not None:
            options["score"] = command_score(options["score"])
        if (options["method"] == "interpolate") != (self.points is not None):
            raise ConfigError("--points belongs to --method interpolate, which needs it.")
        if self.out is None and not self.dry_run:
            raise ConfigError("Missing option --out: the directory to make (or --dry-run).")
        if self.points is not None:
            return self._interpolate(options)
        with _progress() as progress:
            if self.dry_run:
                options["allow_identical"] = options.pop("force")
                record = measure_soup(self.ingredients, progress=progress, **options)
            else:
                assert self.out is not None
                made = make_soup(self.ingredients, out=self.out, progress=progress, **options)
                record = json.loads((made.path / "soup.json").read_text())
        if self.as_json:
            print(json.dumps(record, indent=1))
            return
        _show(record)
        if not self.dry_run:
            print(f"{self.out}  sha256 {record['sha256'][:12]}")

    def _interpolate(self, options: dict[str, Any]) -> None:
        if len(self.ingredients) != 2 or options["weights"] is not None or self.dry_run:
            raise ConfigError(
                "--method interpolate takes two models and --points, no weights and no dry run."
            )
        kept = ("base", "dtype", "heads", "take_from", "extrapolate", "force")
        points = _numbers("--points", self.points)
        assert points is not None and self.out is not None
        start, end = self.ingredients
        own = {name: options[name] for name in kept}
        for made in interpolate(start, end, points=points, out=self.out, **own):
            print(f"{made.path}  sha256 {made.digest[:12]}")


def command_score(command: str) -> Score:
    """A score from a command: `{}` (or the end) becomes the directory, the last line printed is the number.

    Raises (when called):
        WorkFailed: the command fails, or its last line is no number.
    """

    def score(path: Path) -> float:
        words = shlex.split(command)
        if "{}" not in command:
            words.append("{}")
        words = [word.replace("{}", str(path)) for word in words]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise WorkFailed(f"--score: {shlex.join(words)} ended with code {done.returncode}.")
        lines = done.stdout.strip().splitlines()
        try:
            return float(lines[-1])
        except (IndexError, ValueError):
            last = lines[-1] if lines else "nothing"
            raise WorkFailed(
                f"--score: {shlex.join(words)} printed {last!r} last, which is no number."
            ) from None

    return score


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

    with Progress(
        "averaging",
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("averaging", total=None, visible=False)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=total > _PROGRESS_AFTER)

        yield advance


def _show(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    diagnostics = record["diagnostics"]
    of = "delta" if diagnostics["of"] == "deltas" else "weights"
    count = len(record["ingredients"])
    console.print(f"soup of {count}, {record['method']}, {record['dtype']}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("ingredient", overflow="fold")
    for name in ("weight", f"norm of {of}", *(f"cos to {i}" for i in range(count))):
        table.add_column(name, justify="right")
    for i, ingredient in enumerate(record["ingredients"]):
        cosines = [_short(c, 4) for c in diagnostics["cosines"][i]]
        norm = _short(diagnostics["norms"][i], 4)
        table.add_row(str(i), ingredient["path"], f"{ingredient['weight']:.4g}", norm, *cosines)
    table.add_row("", "soup", "", _short(diagnostics["soup_norm"], 4))
    console.print(table)
    _show_layers(console, diagnostics)
    loss = diagnostics["bf16_rounding"]
    if (share := loss["share_of_delta"]) is not None:
        console.print(f"bf16 would lose {_share(share)} of the delta ({loss['delta']})")
    for step in record.get("greedy", ()):
        verdict = "kept" if step["kept"] else "left out"
        console.print(f"greedy: {step['ingredient']} {verdict}, score {step['soup']:.6g}")


def _show_layers(console: Any, diagnostics: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layer")
    for name in ("elements", "mean norm", "mean cos", "mean distance", "soup / mean norm"):
        table.add_column(name, justify="right")
    for row in diagnostics["layers"]:
        table.add_row(
            row["layer"],
            f"{row['elements']:,}",
            *(
                _short(row[k], 4)
                for k in ("norm", "cosine", "relative_distance", "soup_norm_ratio")
            ),
        )
    console.print(table)


def _short(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _share(value: float) -> str:
    return f"{value:.1%}" if value < 1 else f"all: {value:.3g} times the size"

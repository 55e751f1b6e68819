"""N checkpoints in, one out: an ordinary Hugging Face directory. numpy only, no torch.

    θ_soup = Σ_i w_i θ_i        (SALSA: two SFT models, w = ½ each)

Sums run in float64 and are rounded once; memory depends neither on the model's size nor on N. Nothing is guessed: what
is not the same in all ingredients (keys, shapes, architecture, vocabulary) is an error; `soup.json` says what was done.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from salsa.artifacts import Checkpoint, new_directory, resolve, write_atomic
from salsa.errors import ConfigError, WorkFailed
from salsa.soup.average import Source, average
from salsa.soup.blend import Progress
from salsa.soup.methods import Method, Mix, Score

__all__ = ["Method", "Score", "interpolate", "make_soup", "measure_soup", "write_soup"]

_log = logging.getLogger("salsa.soup")
_HUB_SNAPSHOT = re.compile(r"models--(.+)/snapshots/([0-9a-f]{40})$")


def make_soup(
    ingredients: Sequence[Path | str],
    *,
    weights: Sequence[float] | None = None,
    out: Path | str,
    method: Method = "linear",
    base: Path | str | None = None,
    dtype: str = "auto",
    alpha: float | None = None,
    score: Score | None = None,
    heads: str | None = None,
    take_from: int | None = None,
    normalize: bool = False,
    extrapolate: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Average checkpoints into a new directory, all or nothing.

    Args:
        ingredients: model directories, hub names (`org/name`, `org/name@revision`) or LoRA adapters of one base.
        weights: one each, summing to 1; uniform if not given.
        out: the directory to make.
        method: `linear`; `greedy` (adds an ingredient, best first, iff `score` does not fall); `wise` (the linear soup,
            moved from `base` by the share `alpha`); `slerp` (on deltas, per tensor); `model_stock` (per tensor).
        base: what the ingredients were tuned from. The last three methods need it, distances are then those of the
            deltas, and adapters are added to it (without it they give an adapter).
        dtype: `auto` (the widest ingredient's), float64, float32, float16 or bfloat16.
        alpha: of `wise`, 0 = base, 1 = soup.
        score: of `greedy`.
        heads: what becomes of heads on top (`score`, `v_head`, …): `average`, `drop` or `keep-from-I`.
        take_from: number of the ingredient that settings which differ come from (chat template, generation, …).
        normalize: scale the weights to sum to 1.
        extrapolate: allow negative weights and weights that do not sum to 1.
        force: replace the model directory at `out`; allow identical ingredients.
        progress: called with (elements done, elements in all).

    Raises:
        ConfigError: the options do not fit, or `out` exists.
        CheckpointError: an ingredient is broken or they do not go together; the message names the tensor or file.
        WorkFailed: the score failed, or the disk is full.
    """
    mix = Mix(
        weights=weights,
        method=method,
        alpha=alpha,
        score=score,
        dtype=dtype,
        heads=heads,
        take_from=take_from,
        normalize=normalize,
        extrapolate=extrapolate,
        allow_identical=force,
    )
    out = Path(out)
    sources = [_source(path) for path in ingredients]
    base_source = _source(base) if base is not None else None
    _check_target(out, [*sources, *([base_source] if base_source else [])])
    try:
        with new_directory(out, force=force) as partial:
            digest = _write(sources, base_source, mix, partial, progress)
    except OSError as error:
        raise WorkFailed(f"{out}: {error}. Nothing was left there.") from error
    return Checkpoint(out, digest)


def write_soup(
    ingredients: Sequence[Checkpoint],
    directory: Path,
    *,
    base: Checkpoint | None = None,
    **options: Any,
) -> str:
    """Fill `directory` with a soup of checkpoints whose digests must still hold; returns its digest.

    Options: `weights`, `method`, `dtype`, `alpha`, `score`, `heads` as of `make_soup`, which says what is raised.
    """
    sources = [Source(c.path, str(c.path), c.digest) for c in ingredients]
    base_source = Source(base.path, str(base.path), base.digest) if base is not None else None
    return _write(sources, base_source, Mix(**options), directory)


def measure_soup(
    ingredients: Sequence[Path | str],
    *,
    base: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `soup.json` of these ingredients would say, without writing anything; options as of `make_soup` but `out`.

    Raises:
        ConfigError: the options do not fit, or the method is greedy.
        CheckpointError: an ingredient is broken or they do not go together; the message names the tensor or file.
    """
    mix = Mix(**options, allow_identical=force)
    if mix.method == "greedy":
        raise ConfigError(
            "soup: a greedy soup is scored, so it must be written. Use make_soup (leave --dry-run out)."
        )
    base_source = _source(base) if base is not None else None
    return average([_source(path) for path in ingredients], base_source, mix, None, progress)


def interpolate(
    start: Path | str,
    end: Path | str,
    *,
    points: Sequence[float],
    out: Path | str,
    force: bool = False,
    **options: Any,
) -> list[Checkpoint]:
    """Checkpoints along the line (1 − t) θ_start + t θ_end, one directory a point (LITI, arXiv 2312.06795).

    The models are `out/t=0.25` and so on for `points`, the values of t, outside 0 to 1 only with `extrapolate`;
    `force` replaces what was made there before. Options: `base`, `dtype`, `heads`, `take_from` as of `make_soup`, which
    says what is raised.
    """
    out = Path(out)
    if not points or len(set(points)) != len(points):
        raise ConfigError("soup: give different points= (--points), e.g. 0,0.25,0.5,0.75,1.")
    _check_target(out, [_source(start), _source(end)])
    with new_directory(out, force=force) as partial:
        made = [
            make_soup([start, end], weights=(1 - t, t), out=partial / f"t={t:g}", **options)
            for t in points
        ]
        record = {"method": "interpolate", "points": list(points)}
        write_atomic(partial / "soup.json", json.dumps(record, indent=1) + "\n")
    return [Checkpoint(out / one.path.name, one.digest) for one in made]


def _source(path: Path | str) -> Source:
    directory = resolve(str(path))
    snapshot = _HUB_SNAPSHOT.search(directory.as_posix())
    if snapshot is None:
        return Source(directory, str(path))
    return Source(directory, f"{snapshot[1].replace('--', '/')}@{snapshot[2]}")


def _check_target(out: Path, sources: Sequence[Source]) -> None:
    if out.resolve() in [source.path.resolve() for source in sources]:
        raise ConfigError(f"{out}: is one of the ingredients. Give another directory.")
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir():
        raise ConfigError(f"{out}: {above} is a file. Give another directory.")


def _write(
    sources: Sequence[Source],
    base: Source | None,
    mix: Mix,
    directory: Path,
    progress: Progress | None = None,
) -> str:
    """Fill a directory that is there; returns its digest."""
    tried: list[dict[str, Any]] = []
    if mix.method == "greedy":
        mix, tried = _greedy(sources, base, mix, directory)
    record = average(sources, base, mix, directory, progress) | ({"greedy": tried} if tried else {})
    for warning in record["warnings"]:
        _log.warning("soup: %s", warning)
    write_atomic(directory / "soup.json", json.dumps(record, indent=1) + "\n")
    return record["sha256"]


def _greedy(
    sources: Sequence[Source], base: Source | None, mix: Mix, directory: Path
) -> tuple[Mix, list[dict[str, Any]]]:
    """Greedy soup (arXiv 2203.05482, recipe 1): best first, each next one stays iff the score does not fall."""
    mix.check(len(sources), has_base=base is not None)
    assert mix.score is not None
    scores = [_scored(mix.score, source.path) for source in sources]
    order = sorted(range(len(sources)), key=lambda i: -scores[i])
    kept, best = [order[0]], scores[order[0]]
    tried = [{"ingredient": order[0], "alone": best, "soup": best, "kept": True}]
    candidate = directory / "candidate"
    for i in order[1:]:
        shutil.rmtree(candidate, ignore_errors=True)
        candidate.mkdir()
        average(sources, base, replace(mix, kept=(*kept, i)), candidate)
        score = _scored(mix.score, candidate)
        tried.append({"ingredient": i, "alone": scores[i], "soup": score, "kept": score >= best})
        if score >= best:
            kept, best = [*kept, i], score
    shutil.rmtree(candidate, ignore_errors=True)
    return replace(mix, kept=tuple(kept)), tried


def _scored(score: Score, path: Path) -> float:
    try:
        value = float(score(path))
    except WorkFailed:
        raise
    except Exception as error:
        raise WorkFailed(
            f"soup: the score of {path} failed: {error}. Mend score= (--score)."
        ) from error
    if math.isnan(value):
        raise WorkFailed(f"soup: the score of {path} is NaN. Let score= (--score) give a number.")
    return value

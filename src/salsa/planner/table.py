"""A plan as a person reads it in the terminal. No torch."""

from collections.abc import Sequence

from salsa.config import Recipe
from salsa.planner.estimate import PlannedStage, planned_stages, smallest_change
from salsa.planner.hardware import GIB, PRICED, Hardware
from salsa.planner.memory import Memory
from salsa.planner.shapes import is_known
from salsa.planner.work import Work

_PARTS = {
    "weights": "weights that learn", "gradients": "gradients", "optimizer": "optimizer",
    "frozen": "frozen models", "activations": "activations", "kv_cache": "KV cache", "logits": "logits",
    "process": "libraries, heap",
}  # fmt: skip
_UNITS = {
    "memory_gib": "GiB a card", "tflops": "TFLOP/s a card", "bandwidth": "GB/s of its memory",
    "link": "GB/s to cards beside it", "network": "GB/s to other machines", "price": "$ an hour a card",
    "utilisation": "of tflops while training", "decode_utilisation": "of bandwidth while decoding",
    "usable": "of the memory for tensors", "fill": "of the length limits in an average row",
    "replies": "replies in an UltraChat conversation", "cards_per_machine": "cards a machine",
}  # fmt: skip


def on_hardware(recipe: Recipe, hardware: Hardware) -> str:
    """Memory by part, work, hours and cost of every stage, and whether it fits.

    Raises:
        ConfigError: a model's shape is not known.
    """
    stages = planned_stages(recipe, hardware)
    precision = hardware.rank(recipe.model.precision).precision
    ranks = hardware.ranks
    who = "of the process" if ranks == 1 else f"of each of {ranks} ranks (FSDP2)"
    lines = [f"on {hardware.text} in {precision}: GiB {who} at the peak of each phase", ""]
    lines += [*_memory_table(recipe, stages, hardware), "", *_work_table(stages, hardware), ""]
    lines += [*_verdicts(recipe, hardware, stages), "", *_assumptions(hardware)]
    for path in recipe.reward.paths[:1]:
        if not is_known(path):
            lines.append(f"{path} is not here: planned as if it had the base's shape.")
    return "\n".join(lines)


def _memory_table(recipe: Recipe, stages: Sequence[PlannedStage], hardware: Hardware) -> list[str]:
    """A column a phase; of RL's arms the one that needs most, and a line for the others."""
    arms = [stage for stage in stages if stage.name in recipe.rl.arms]
    most = max(arms, key=lambda stage: stage.peak.total)
    columns: dict[str, Memory] = {}
    for stage in stages:
        if stage is most:
            columns |= {f"{stage.name} {phase}": one for phase, one in stage.phases.items()}
        elif stage not in arms:
            columns[stage.name] = stage.peak
    rows = [["", *columns]]
    for part, words in _PARTS.items():
        sizes = [vars(memory)[part] for memory in columns.values()]
        if not any(sizes):
            continue
        rows.append([words, *("" if size < 0.0005 * GIB else _gib(size) for size in sizes)])
    rows.append(["in all", *(_gib(memory.total) for memory in columns.values())])
    fits = lambda memory: "fits" if memory.total <= hardware.budget else "too much"
    rows.append([f"of {_gib(hardware.budget)}", *(fits(memory) for memory in columns.values())])
    others = ", ".join(f"{s.name} {_gib(s.peak.total)}" for s in arms if s is not most)
    return _aligned(rows) + ([f"peaks of the other arms: {others}"] if others else [])


def _work_table(stages: Sequence[PlannedStage], hardware: Hardware) -> list[str]:
    rows = [["", "runs", "tokens", "FLOPs", "hours", "cost"]]
    total, hours = Work(), 0.0
    for stage in stages:
        seconds = stage.seconds(hardware)
        if stage.work is None or seconds is None:
            rows.append([stage.name, str(stage.runs), "?", "?", "?", "?"])
            continue
        work = stage.work * stage.runs
        total, hours = total + work, hours + seconds / 3600
        rows.append([stage.name, str(stage.runs), *_work_cells(work, seconds / 3600, hardware)])
    rows.append(["in all", "", *_work_cells(total, hours, hardware)])
    lines = _aligned(rows)
    if unknown := [stage.name for stage in stages if stage.work is None]:
        lines.append(
            f"?  the rows of {', '.join(unknown)} are not known before they are read; a `limit:` makes them known"
        )
    if hardware.ranks > 1 and (alone := [stage.name for stage in stages if not stage.divided]):
        lines.append(f"{', '.join(alone)}: by one rank while the others wait")
    return lines


def _work_cells(work: Work, hours: float, hardware: Hardware) -> list[str]:
    dollars = hours * hardware.count * hardware.assumed.price
    return [
        f"{work.tokens / 1e6:,.1f} M" if work.tokens < 1e9 else f"{work.tokens / 1e9:,.2f} G",
        f"{work.flops:.1e}",
        f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}",
        f"${dollars:,.2f}" if hours < 10 else f"${dollars:,.0f}",
    ]


def _verdicts(recipe: Recipe, hardware: Hardware, stages: Sequence[PlannedStage]) -> list[str]:
    """A line for what does not fit; one in all if every stage does."""
    budget, found = hardware.budget, dict[str, list[str]]()
    for stage in stages:
        if stage.peak.total <= budget:
            continue
        changes = smallest_change(recipe, hardware, stage)
        words = "; or ".join(
            one.words + ("" if one.keeps_result else " (another result)") for one in changes
        )
        line = f"{_gib(stage.peak.total)} of {_gib(budget)} GiB; smallest change: " + (
            words or "none of those tried; take a smaller model"
        )
        found.setdefault(line, []).append(stage.name)
    if found:
        return [f"does not fit: {', '.join(names)}: {line}" for line, names in found.items()]
    most = max(stages, key=lambda stage: stage.peak.total)
    return [f"fits: {most.name} needs most, {_gib(most.peak.total)} of {_gib(budget)} GiB"]


def _assumptions(hardware: Hardware) -> list[str]:
    """What the numbers rest on; every number can be given."""
    units = _UNITS | {"memory_gib": "GiB here"} if hardware.on_cpu else _UNITS
    elsewhere = ("link", "network", "cards_per_machine") if hardware.on_cpu else ()
    told = [
        f"{key}={value:.4g} {units[key].replace('a card', 'a core' if hardware.on_cpu else 'a card')}"
        for key, value in vars(hardware.assumed).items()
        if key not in elsewhere
    ]
    lines, line = [], "assumed (--assume key=number):"
    for words in told:
        if len(line) + len(words) > 112:
            lines.append(line)
            line = "   "
        line += f" {words}{',' if words is not told[-1] else '.'}"
    lines.append(line)
    lines.append(
        f"Prices are of {PRICED}. Memory: every row at its length limit. Measured on a CPU in one process "
        "(docs/how-to/plan.md);"
    )
    return [*lines, "hours, costs, GPUs and several ranks are arithmetic, not measured."]


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.1f}" if gib >= 9.995 else f"{gib:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    ]

"""Does a quickstart in fp32 still give the numbers that were recorded before the rebuild?

    salsa run recipes/quickstart.yaml model.precision=fp32 -o runs/golden
    python scripts/compare_golden.py runs/golden

Every number of the recording is looked up in the run under its present name; names are all that may differ. Digits
depend on the kind of processor and on the number of threads: `made_by` in the recording says which those were.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salsa.runtime.tracking import round_metric

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "quickstart_fp32.json"
RENAMED = {
    "kl_anchor": "kl_to_sft[0]",
    "kl_base": "kl_to_base",
    "kl_sft[0]": "kl_to_sft[0]",
    "kl_sft[1]": "kl_to_sft[1]",
    "kl_sft[2]": "kl_to_sft[2]",
}


def main() -> None:
    """Print what differs; exit code 1 if anything does."""
    run = Path(sys.argv[1])
    golden, here = json.loads(GOLDEN.read_text(encoding="utf-8")), _numbers_of(run)
    differences, compared = [], 0
    for place, expected in _leaves({key: golden[key] for key in ("arms", "pairs", "curves")}):
        value = _at(here, place)
        compared += 1
        if isinstance(expected, float) and value == round_metric(expected):
            continue  # recorded in full, in a report's seven digits by now
        if value != expected:
            differences.append(f"{'.'.join(map(str, place))}: {expected!r} -> {value!r}")
    print("\n".join(differences[:20]))
    print(f"{compared} values compared, {len(differences)} differ ({golden['made_by']})")
    sys.exit(1 if differences else 0)


def _numbers_of(run: Path) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    curves = {}
    for record in sorted((run / "stages").glob("*/stage.json")):
        label = json.loads(record.read_text(encoding="utf-8"))["stage"]
        metrics = record.with_name("metrics.jsonl")
        if label.startswith("rl "):
            curves[label] = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {"arms": report["arms"], "pairs": report["pairs"], "curves": curves}


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield place, value
    for key, inner in items:
        yield from _leaves(inner, (*place, key))


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        try:
            value = value[RENAMED.get(key, key)]
        except (KeyError, IndexError, TypeError):
            return None
    return value


if __name__ == "__main__":
    main()

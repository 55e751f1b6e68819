"""The whole validation by one command; see the package."""

import argparse
import json
from pathlib import Path

from salsa.runtime.tracking import quiet_libraries, say
from tests.faults.bench import everything, table


def main() -> None:
    """Run what is missing, then write confusion.md and confusion.json of all that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory of runs and verdicts; goes on where it stopped",
    )
    parser.add_argument("--only", default="*", help="pattern of kinds, e.g. 'kl:*' or 'healthy 3'")
    parser.add_argument(
        "--healthy", type=int, default=20, help="healthy runs of different seeds and sizes"
    )
    asked = parser.parse_args()
    quiet_libraries()
    verdicts = []
    for found in everything(asked.out, asked.only, asked.healthy):
        verdicts.append(found)
        say(f"{found['kind']}: {found['verdict']}, {found['culprit']} (should be {found['stage']})")
    (asked.out / "confusion.md").write_text(table(verdicts), encoding="utf-8")
    rows = [{k: v for k, v in found.items() if k != "not_measured"} for found in verdicts]
    (asked.out / "confusion.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(verdicts))


if __name__ == "__main__":
    main()

"""A few episodes of an RL run as the loop saw them, token by token: what `salsa doctor` computes anew and compares.

Written for the first update, whose models are all on disk, and for the last, or what might have been the last under
`rl.stop`. It lies in a directory of its own below the stage, `trace/`, so that it is no part of the stage's output.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from salsa.artifacts import read_jsonl, write_jsonl
from salsa.runtime.tracking import round_metric
from salsa.types import Experience

EPISODES = 32
"""Of a rollout that are kept: the first ones."""
PER_TOKEN = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


def trace_file(directory: Path, update: int) -> Path:
    """Where the episodes of `update` (from 1) lie in an RL stage's directory."""
    return directory / "trace" / f"update-{update}.jsonl"


def write_trace(
    directory: Path,
    update: int,
    experience: Experience,
    sampler_logprobs: Tensor,
) -> None:
    """Write the first episodes of an update (from 1).

    Args:
        directory: of the stage.
        update: from 1.
        experience: the rollout with all that the update learned from.
        sampler_logprobs: [B, R], of the drawn tokens as the sampler had them.
    """
    rollout = experience.rollout
    columns = {name: getattr(experience, name) for name in PER_TOKEN}
    columns["sampler_logprobs"] = sampler_logprobs

    def row(number: int) -> dict[str, Any]:
        mask = rollout.response_mask[number]
        tokens = {name: values[number][mask] for name, values in columns.items()}
        return {
            "prompt": rollout.prompt[number][rollout.prompt_mask[number]].tolist(),
            "response": rollout.response[number][mask].tolist(),
            "score": round_metric(float(experience.scores[number])),
            **{name: [round_metric(v) for v in values.tolist()] for name, values in tokens.items()},
        }

    file = trace_file(directory, update)
    file.parent.mkdir(exist_ok=True)
    write_jsonl(file, [row(number) for number in range(min(len(experience), EPISODES))])


def read_trace(directory: Path, update: int) -> list[dict[str, Any]]:
    """The episodes of `update` (from 1), as written; none where the stage kept none."""
    return read_jsonl(trace_file(directory, update))

"""PPO of salsa against `trl.experimental.ppo` of TRL 1.12.0, the last release that has it, alternately.

    python -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0
    python benchmarks/ppo_vs_trl.py --trl-python trl-venv/bin/python [--model DIR] [--prompts FILE]

Same model, prompts, batch, lengths and epochs, fp32 master weights, computing in fp32 or bf16 (--precision; both by
default, one after the other); a critic, a reward model and a
reference of their own on either side; each run in a process of its own, so that its peak memory is its own. The
first update of a run warms up and does not count. CPU seconds stand beside wall time, which a busy machine stretches.
Two settings of ours: its defaults, and `lean`, one forward pass a step with gradient checkpointing. Two of TRL:
`like`, without gradient checkpointing, in micro-batches of half the batch; and, if asked for, `default`, its own
(gradient checkpointing, the whole batch at once). First of all, both must compute the same loss. Prints one JSON line.

How the loss is compared: one fixed batch whose old logprobs and values are off-policy by a given noise, in fp32; TRL's
own `train()` runs on it (trl_side.py), and our functions on what it saw. Where responses end before the limit, TRL puts
the score one slot behind the last token, and its value loss counts that slot; with the mask extended likewise our
functions must give its numbers again.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import draw_prompts, make_scorer, model_directory, run_child, say

from salsa import objectives
from salsa.data import Prompt
from salsa.models import LanguageModel, ValueModel
from salsa.runtime.engine import Engine
from salsa.runtime.sampler.local import left_padded
from salsa.types import Rollout

HERE = Path(__file__).parent
KL_COEF, CLIP, TOLERANCE = 0.05, 0.2, 1e-4


def compare_losses(job: dict[str, Any], prompts: list[Prompt], python: str) -> dict[str, Any]:
    """Largest differences between TRL's figures and ours: full-length rows, ended rows, and ended rows its way."""
    found = {}
    for name, lengths in (("full", (8, 8, 8, 8)), ("ended", (8, 3, 5, 1))):
        given, theirs = _trl_figures(job, prompts, python, torch.tensor(lengths))
        found[name] = _differences(_our_figures(job, given, theirs, late_score=False), theirs)
        if name == "ended":
            late = _our_figures(job, given, theirs, late_score=True)
            found["ended_with_the_score_one_slot_late"] = _differences(late, theirs)
    return found


def _trl_figures(
    job: dict[str, Any], prompts: list[Prompt], python: str, lengths: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A fixed batch, and what TRL's train() computes on it."""
    rng = torch.Generator().manual_seed(0)
    width = int(lengths.max())
    prompt, prompt_mask = left_padded(
        [prompt.ids for prompt in prompts], job["pad_id"], torch.device("cpu")
    )
    mask = torch.arange(width) < lengths[:, None]
    tokens = torch.randint(1000, 4000, mask.shape, generator=rng)
    given = {
        "prompt": prompt,
        "prompt_mask": prompt_mask,
        "response": torch.where(mask, tokens, job["pad_id"]),
        "response_mask": mask,
        "scores": torch.randn(len(prompts), generator=rng),
        "logprob_noise": torch.randn(mask.shape, generator=rng) * 0.3,
        "value_noise": torch.randn(mask.shape, generator=rng),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {"batch": f"{folder}/batch.pt", "out": f"{folder}/out.pt"}
        torch.save(given, files["batch"])
        own = {"bf16": False, "microbatch": len(prompts), "gradient_checkpointing": False}
        run_child(
            [python, str(HERE / "trl_side.py"), "loss"],
            job | files | own | {"prompts": [list(p.ids) for p in prompts]},
        )
        return given, torch.load(files["out"])


def _our_figures(
    job: dict[str, Any],
    given: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    *,
    late_score: bool,
) -> dict[str, torch.Tensor]:
    """The same figures by our functions, on the same tokens and models, from TRL's (noised) old logprobs and values."""
    rollout = Rollout(*(given[n] for n in ("prompt", "prompt_mask", "response", "response_mask")))
    mask = value_mask = rollout.response_mask
    if late_score:  # one slot more, where there is one
        value_mask = torch.arange(mask.shape[1]) < rollout.lengths[:, None] + 1
    engine = Engine.create("fp32")
    policy = LanguageModel.load(Path(job["model"]), engine)
    critic = ValueModel.load(Path(job["scorer"]), engine, pad_id=job["pad_id"], new_head_seed=0)
    with torch.no_grad():
        logprobs = policy.stats(rollout, job["temperature"]).logprobs
        values = critic.values(replace(rollout, response_mask=value_mask))
    old = torch.where(mask, theirs["old_logprobs"], 0)
    old_values = torch.where(value_mask, theirs["old_values"], 0)
    rewards = objectives.token_rewards(
        given["scores"], old, logprobs, value_mask, kl_coef=job["kl_coef"]
    )
    raw, returns = objectives.gae(rewards, old_values, value_mask, gamma=1.0, gae_lambda=0.95)
    advantages = objectives.whiten(raw, mask)
    policy_loss = objectives.policy_loss(logprobs, old, advantages, mask, clip_range=CLIP)
    value_loss = objectives.value_loss(
        values, old_values, returns, value_mask, value_clip_range=CLIP
    )
    return {
        "advantages": advantages,
        "returns": torch.where(mask, returns, 0),
        "policy_loss": policy_loss.loss,
        "value_loss": value_loss.loss,
        "clip_fraction": policy_loss.clip_fraction,
    }


def _differences(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Largest absolute difference of each figure."""
    mask = theirs["mask"]
    returns = torch.where(mask, theirs["raw_advantages"] + theirs["old_values"], 0)
    advantages = torch.where(mask, theirs["advantages"], 0)
    expected = theirs | {"returns": returns, "advantages": advantages}
    names = ("advantages", "returns", "policy_loss", "value_loss")
    return {n: float((ours[n] - expected[n]).abs().max()) for n in names} | {
        "clip_fraction": float(ours["clip_fraction"])
    }


def compare_speed(job: dict[str, Any], python: str, rounds: int, full: bool) -> dict[str, Any]:
    """Seconds per update and peak memory of each side, run after run in turn."""
    trl = [python, str(HERE / "trl_side.py"), "speed"]
    own = [sys.executable, str(HERE / "salsa_side.py")]
    lean = job["config"] | {"gradient_checkpointing": True, "microbatch_tokens": 2048}
    sides: dict[str, tuple[list[str], dict[str, Any]]] = {
        "salsa": (own, {}),
        "salsa_lean": (own, {"config": lean}),
        "trl_like": (trl, {"gradient_checkpointing": False}),
    }
    if full:
        whole = {"gradient_checkpointing": True, "microbatch": len(job["prompts"])}
        sides["trl_default"] = (trl, whole)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for seed in range(rounds):
        for name, (command, options) in sides.items():
            runs[name].append(run_child(command, job | options | {"seed": seed}))
            say(f"{name}: {json.dumps(runs[name][-1])}")
    found: dict[str, Any] = {}
    for name, results in runs.items():
        found[name] = {
            "seconds_per_update": [s for result in results for s in result["seconds"]],
            "cpu_seconds_per_update": [s for result in results for s in result["cpu_seconds"]],
            "peak_gb": max(result["peak_gb"] for result in results),
        }
    ours, theirs = ([name for name in sides if name.startswith(who)] for who in ("salsa", "trl"))
    for name in ours:
        found[name]["phases"] = runs[name][-1]["phases"][-1]
        for other in theirs:
            pair = f"{other}_over_{name}"
            for kind in ("seconds", "cpu_seconds"):
                key = f"{kind}_per_update"
                ratio = statistics.median(found[other][key]) / statistics.median(found[name][key])
                found[f"{kind}_of_{pair}"] = ratio
            found[f"memory_of_{name}_over_{other}"] = (
                found[name]["peak_gb"] / found[other]["peak_gb"]
            )
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", required=True, help="a Python that has trl==1.12.0")
    parser.add_argument("--model")
    parser.add_argument("--prompts")
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument(
        "--microbatch-tokens", type=int, default=None, help="ours; default: RLConfig's"
    )
    parser.add_argument("--microbatch", type=int, default=8, help="TRL's rows per forward pass")
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--with-trl-defaults", action="store_true")
    parser.add_argument("--only", choices=("loss", "speed"))
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    args = _arguments()
    model = model_directory(args.model)
    prompts = draw_prompts(args.prompts, model, args.episodes, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": str(model),
            "scorer": str(make_scorer(model, Path(folder))),
            "pad_id": 0,
            "prompts": [list(prompt.ids) for prompt in prompts],
            "microbatch": args.microbatch,
            "bf16": True,
            "seed": 0,
            "new_tokens": args.new_tokens,
            "temperature": 1.0,
            "kl_coef": KL_COEF,
            "gradient_checkpointing": False,
            "updates": args.updates,
            "epochs": 2,
            "learning_rate": 1e-6,
            "config": {"microbatch_tokens": args.microbatch_tokens}
            if args.microbatch_tokens
            else {},
        }
        result: dict[str, Any] = {
            "benchmark": "ppo_vs_trl",
            "model": model.name,
            "cpus": os.cpu_count(),
            "episodes": args.episodes,
            "new_tokens": args.new_tokens,
            "prompt_tokens": sorted(len(prompt.ids) for prompt in prompts),
        }
        if args.only != "speed":
            result["loss_differences"] = compare_losses(job, prompts[:4], args.trl_python)
            say(json.dumps(result["loss_differences"]))
            for name in ("full", "ended_with_the_score_one_slot_late"):
                for figure in ("advantages", "returns", "policy_loss", "value_loss"):
                    if (apart := result["loss_differences"][name][figure]) > TOLERANCE:
                        sys.exit(f"{name}: {figure} differ by {apart:.2g}. Nothing was timed.")
        if args.only != "loss":
            for precision in ("fp32", "bf16") if args.precision == "both" else (args.precision,):
                own = job | {"bf16": precision == "bf16"}
                result[precision] = compare_speed(
                    own, args.trl_python, args.rounds, args.with_trl_defaults
                )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

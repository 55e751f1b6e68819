"""Does torch.compile pay? Seconds of a policy's forward and backward pass, plain and with compiled layers, alternately.

    python benchmarks/compiled.py [--model DIR] [--prompts FILE] [--part mlp|layer]

The pass is the one that an update makes (`LanguageModel.logprobs`, packed, in what is
faster here); compiling is timed by itself, and needs a C++ compiler. Prints one JSON line, with the passes after which
compiling has paid for itself, if it does.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from common import draw_prompts, model_directory, say

from salsa.models import LanguageModel
from salsa.runtime.engine import Engine
from salsa.runtime.sampler.local import left_padded
from salsa.types import Rollout


def seconds(policy: LanguageModel, rollout: Rollout) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    policy.logprobs(rollout, 1.0).mean().backward()
    for weight in policy.trained().values():
        weight.grad = None
    return time.perf_counter() - start


def compile_parts(policy: LanguageModel, part: str) -> None:
    """Mark every layer, or every layer's MLP and norms, to be compiled when it is first run."""
    for layer in policy.trunk.layers:
        pieces = layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
        for module in pieces if part == "mlp" else (layer,):
            module.compile(dynamic=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--prompts")
    parser.add_argument("--part", choices=("mlp", "layer"), default="mlp")
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    engine = Engine.create()
    path = model_directory(args.model)
    prompts = draw_prompts(args.prompts, path, args.episodes, seed=0)
    padded = left_padded([prompt.ids for prompt in prompts], 0, engine.device)
    response = torch.randint(100, 4000, (args.episodes, 32))
    rollout = Rollout(*padded, response, torch.ones_like(response).bool())
    policies = {
        name: LanguageModel.load(path, engine, learns=True) for name in ("plain", "compiled")
    }
    compile_parts(policies["compiled"], args.part)
    first = {name: seconds(policy, rollout) for name, policy in policies.items()}
    say(json.dumps(first))
    found: dict[str, list[float]] = {"plain": [], "compiled": []}
    for _ in range(args.rounds):
        for name, policy in policies.items():
            found[name].append(seconds(policy, rollout))
    plain, compiled = (statistics.median(found[name]) for name in ("plain", "compiled"))
    paid = first["compiled"] / (plain - compiled) if compiled < plain else None
    result = {"benchmark": "compiled", "model": Path(path).name, "part": args.part, "seconds": found,
              "first_pass": first, "speedup": plain / compiled, "passes_until_paid": paid}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()

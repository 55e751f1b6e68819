"""How the cost of a PPO update grows with batch, response length and model size: a table, a plot, exponents.

    python benchmarks/scaling.py [--plot docs/scaling.png]      (the plot: pip install matplotlib)

Random Llamas, so that nothing but the size matters; prompts of 24 tokens; responses do not end early. Each axis moves
one number, the others stay at the middle. An exponent is the slope of log seconds over log axis; 1 is proportional.
Prints one JSON line.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import say
from transformers import LlamaConfig, LlamaForCausalLM

from salsa.artifacts import EMBEDDED, Checkpoint, read_jsonl, resolve
from salsa.config import RLConfig
from salsa.data import Prompt
from salsa.models import load_tokenizer, save_checkpoint
from salsa.rl import RLSetup, train_rl
from salsa.runtime.engine import Engine
from salsa.runtime.tracking import quiet_libraries

MIDDLE = {"episodes": 16, "new_tokens": 32, "width": 256}
AXES = {
    "episodes": (4, 8, 16, 32, 64),
    "new_tokens": (8, 16, 32, 64, 128),
    "width": (128, 192, 256, 384, 512),
}
PHASES = ("rollout", "experience", "update")
VOCABULARY, LAYERS, PROMPT = 4096, 6, 24


def write_model(width: int, folder: Path) -> int:
    """A random Llama with the embedded model's tokenizer that never ends a reply; its number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    save_checkpoint(model, load_tokenizer(resolve(EMBEDDED)), folder)
    return model.num_parameters()


def measure(episodes: int, new_tokens: int, width: int) -> dict[str, Any]:
    """Median seconds per update and of each phase, of two after one that warms up."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(width, Path(folder) / "model")
        checkpoint = Checkpoint.of(Path(folder) / "model")
        config = RLConfig(
            kl_coef=0.05,
            num_updates=3,
            rollout_size=episodes,
            max_new_tokens=new_tokens,
            checkpoint_every=10**6,
        )
        rng = torch.Generator().manual_seed(0)
        prompts = [
            Prompt(tuple(torch.randint(9, VOCABULARY, (PROMPT,), generator=rng).tolist()), None, "")
            for _ in range(episodes)
        ]
        setup = RLSetup(
            "scaling",
            checkpoint,
            checkpoint,
            checkpoint,
            config,
            prompts,
            lambda prompts, responses: [float(len(r)) for r in responses],
            seed=0,
        )
        out = Path(folder) / "out"
        out.mkdir()
        train_rl(setup, out, Engine.create())
        rows = read_jsonl(out / "metrics.jsonl")[1:]
    phases = {p: statistics.median(row[f"seconds_{p}"] for row in rows) for p in PHASES}
    return {"parameters": parameters, "seconds": sum(phases.values()), **phases}


def exponent(x: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(seconds), 1)[0])


def plot(
    points: dict[str, list[dict[str, Any]]], exponents: dict[str, dict[str, float]], file: str
) -> None:
    """One panel an axis, log over log."""
    import matplotlib.pyplot as plt

    labels = {"episodes": "episodes", "new_tokens": "response tokens", "width": "parameters"}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for panel, (axis, rows) in zip(panels, points.items(), strict=True):
        x = [row["x"] for row in rows]
        for phase in ("seconds", *PHASES):
            name = "whole update" if phase == "seconds" else phase
            style = "o-" if phase == "seconds" else "o--"
            panel.loglog(x, [row[phase] for row in rows], style, ms=3,
                         label=f"{name}: x^{exponents[axis][phase]:.2f}")  # fmt: skip
        panel.set_xlabel(labels[axis])
        panel.set_xticks(x, [f"{value / 1e6:.1f} M" if value > 1e6 else value for value in x])
        panel.minorticks_off()
        panel.legend(fontsize=7, frameon=False)
        panel.grid(alpha=0.3, which="both", lw=0.4)
    panels[0].set_ylabel("seconds per update")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot")
    args = parser.parse_args()
    quiet_libraries()
    points: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES}
    for axis, values in AXES.items():
        for value in values:
            found = measure(**MIDDLE | {axis: value})
            x = found["parameters"] if axis == "width" else value
            points[axis].append({"x": x, **found})
            say(f"{axis} {value}: {found}")
    exponents = {
        axis: {
            phase: exponent([row["x"] for row in rows], [row[phase] for row in rows])
            for phase in ("seconds", *PHASES)
        }
        for axis, rows in points.items()
    }
    if args.plot:
        plot(points, exponents, args.plot)
    print(json.dumps({"benchmark": "scaling", "points": points, "exponents": exponents}))


if __name__ == "__main__":
    main()

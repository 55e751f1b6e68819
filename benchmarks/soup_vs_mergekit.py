"""Two fp32 checkpoints of 135M parameters, averaged by `salsa soup` and `mergekit-yaml` in turn, as whole processes.

    python benchmarks/soup_vs_mergekit.py --mergekit OTHER_VENV/bin [A B] [--rounds 5]

mergekit is not a dependency: install it into a virtual environment of its own. Without A and B, two random checkpoints
of SmolLM2-135M's shapes are made. Prints a JSON line: median seconds, ratios, and the share that is start-up and
imports. The floor is what no program can avoid: reading both inputs and writing as much as one of them (`cp`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from salsa.artifacts import EMBEDDED_PATH

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
    "input_layernorm": (576,),
    "post_attention_layernorm": (576,),
}


def make(directory: Path, seed: int) -> Path:
    """A random checkpoint of SmolLM2-135M's shapes."""
    directory.mkdir()
    start, own = np.random.default_rng(0), np.random.default_rng(seed)
    names = {f"model.layers.{n}.{k}.weight": s for n in range(30) for k, s in SHAPES.items()}
    names |= {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    values = {}
    for key, shape in names.items():
        values[key] = start.standard_normal(shape, np.float32)
        values[key] += 0.01 * own.standard_normal(shape, np.float32)
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_PATH / name, directory)
    config = json.loads((EMBEDDED_PATH / "config.json").read_text())
    sizes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
    }
    (directory / "config.json").write_text(json.dumps(config | sizes))
    return directory


def seconds(command: list[str], *, cold: bool = False) -> float:
    """Wall-clock time of a process that must succeed; `cold` empties the page cache first, which takes root."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return elapsed


def floor(models: list[Path], scratch: Path, *, cold: bool) -> float:
    """Read both inputs, write one output, with the system's own tools."""
    files = [str(m / "model.safetensors") for m in models]
    (scratch / "copy").unlink(missing_ok=True)
    reading = seconds(["sh", "-c", f"cat {' '.join(files)} > /dev/null"], cold=cold)
    return reading + seconds(["cp", files[0], str(scratch / "copy")])


def measure(
    models: list[Path], mergekit: Path, rounds: int, scratch: Path, *, cold: bool
) -> dict[str, object]:
    """Alternate the three, `rounds` times."""
    recipe = scratch / "linear.yml"
    entries = "".join(f"  - model: {m}\n    parameters: {{weight: 0.5}}\n" for m in models)
    recipe.write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{entries}")
    python, theirs = sys.executable, str(mergekit / "python")
    ours_out, theirs_out = scratch / "ours", scratch / "theirs"
    commands = {
        "salsa": [python, "-m", "salsa", "soup", *map(str, models), "-o", str(ours_out)],
        "mergekit": [str(mergekit / "mergekit-yaml"), str(recipe), str(theirs_out)],
        "salsa_imports": [python, "-c", "import salsa.cli, salsa.soup.terminal"],
        "mergekit_imports": [theirs, "-c", "import mergekit.scripts.run_yaml"],
    }
    times: dict[str, list[float]] = {name: [] for name in ("floor", *commands)}
    floor(models, scratch, cold=False)  # warm the page cache
    for _ in range(rounds):
        times["floor"].append(floor(models, scratch, cold=cold))
        for name, command in commands.items():
            for out in (ours_out, theirs_out):
                shutil.rmtree(out, ignore_errors=True)
            times[name].append(seconds(command, cold=cold))
            if name == "salsa":
                ours = load_file(ours_out / "model.safetensors")
            elif name == "mergekit":
                apart = differing(ours, theirs_out)
    middle = {name: round(statistics.median(values), 3) for name, values in times.items()}
    pairs = list(zip(times["mergekit"], times["salsa"], strict=True))
    return {
        "benchmark": "soup_vs_mergekit",
        "seconds": middle,
        "seconds_min": {name: round(min(values), 3) for name, values in times.items()},
        "mergekit_over_salsa": round(statistics.median(m / s for m, s in pairs), 2),
        "salsa_over_floor": round(middle["salsa"] / middle["floor"], 2),
        "import_share": {
            name: round(middle[f"{name}_imports"] / middle[name], 2)
            for name in ("salsa", "mergekit")
        },
        "elements_that_differ": apart,
        "cold": cold,
        "rounds": rounds,
    }


def differing(ours: dict[str, np.ndarray], theirs: Path) -> float:
    """Share of elements in which the two results differ."""
    total = unequal = 0
    for file in theirs.glob("*.safetensors"):
        for key, value in load_file(file).items():
            total += value.size
            unequal += int((value != ours[key]).sum())
    return round(unequal / total, 4)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--mergekit", type=Path, required=True, help="bin/ of its environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="empty the page cache each time (root)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        models = chosen.models or [make(scratch / n, s) for s, n in enumerate("ab", 1)]
        found = measure(models, chosen.mergekit, chosen.rounds, scratch, cold=chosen.cold)
        print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Two bf16 checkpoints of 5 GB, averaged by `salsa.make_soup` and by mergekit in turn, imports apart.

    python benchmarks/soup_large.py SCRATCH [--gb 5] [--rounds 3] [--cold] [--mergekit OTHER_VENV/bin]

SCRATCH needs room for four times --gb and, without --mergekit, for a virtual environment that mergekit is installed
into. Everything that was made there is deleted at the end. Each run is a process of its own that times its work from
after the imports to the last byte; ours waits for the disk (fsync), mergekit does not, and is timed again with it.
`copy` is what no program can avoid: reading both inputs and writing as much as one of them to the disk, by one
thread. `--cold` drops the checkpoints from the page cache before every run. Prints a JSON line: median seconds, ratios,
the share of the copy's speed that is reached, and peaks of resident memory (mergekit's with the mapped files). Linux.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np

from salsa.artifacts import EMBEDDED_PATH
from salsa.soup.files import Weights, WeightsWriter

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
PIECE = 1 << 22

TIMED = """
import json, os, sys, time
{imports}
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
for folder, _, names in os.walk(out):
    for name in names:
        file = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.fsync(file)
        os.close(file)
synced = time.perf_counter() - start
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = int(line.split()[1]) / 1024
cpu = sum(os.times()[:2])
print("RESULT", json.dumps({{"seconds": seconds, "synced": synced, "peak_mib": peak, "cpu": cpu}}))
"""
OURS = TIMED.format(
    imports="from salsa import make_soup\nimport salsa.soup\nout, *models = sys.argv[1:]",
    work="make_soup(models, out=out)",
)
THEIRS = TIMED.format(
    imports="""from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
out, *models = sys.argv[1:]
entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
values = {"merge_method": "linear", "dtype": "bfloat16", "models": entries}
config, options = MergeConfiguration.model_validate(values), MergeOptions(quiet=True)""",
    work="run_merge(config, out, options)",
)
COPY = TIMED.format(
    imports="out, *files = sys.argv[1:]\nbuffer = memoryview(bytearray(1 << 22))\nos.mkdir(out)",
    work="""with open(out + "/copy", "wb", buffering=0) as target:
    for number, name in enumerate(files):
        with open(name, "rb", buffering=0) as source:
            while count := source.readinto(buffer):
                if number < len(files) // 2:
                    target.write(buffer[:count])
    os.fsync(target.fileno())""",
)


def make(directory: Path, seed: int, layers: int) -> Path:
    """A checkpoint in Llama-2-7B's shapes with fewer layers: the numbers of a base, the same for all, and a little."""
    directory.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{k}.weight": s for k, s in LAYER.items()}
    start, own = (np.random.default_rng(s).standard_normal(PIECE, np.float32) for s in (0, seed))
    piece = (0.02 * start + 0.001 * own).astype(ml_dtypes.bfloat16)
    plan = {key: ("BF16", shapes[key]) for key in sorted(shapes)}
    with closing(WeightsWriter(directory, plan)) as writer:
        for _, shape in plan.values():
            left = int(np.prod(shape))
            while left > 0:
                writer.write(piece[: min(left, PIECE)])
                left -= PIECE
        writer.finish()
    config = json.loads((EMBEDDED_PATH / "config.json").read_text()) | {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def install_mergekit(scratch: Path) -> Path:
    """A virtual environment with mergekit; its bin/."""
    environment = scratch / "mergekit"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    torch = next(line for line in constraints if line.startswith("torch=="))
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", torch]
    subprocess.run([*pip, "mergekit==0.1.5"], check=True)
    return environment / "bin"


def child(python: str, code: str, out: Path, arguments: list[Path]) -> dict[str, float]:
    """What a process of its own measured."""
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [python, "-c", code, out, *arguments], capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"exit code {done.returncode}\n{done.stderr[-3000:]}")


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bits(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and bits of each piece of the weights, by name."""
    weights = Weights(directory)
    for key in sorted(weights.tensors):
        tensor = weights.tensors[key]
        for first in range(0, tensor.size, PIECE):
            piece = weights.read(tensor, first, min(first + PIECE, tensor.size))
            yield key, piece.view(np.uint16)
    weights.close()


def differing(ours: Path, theirs: Path) -> float:
    """Share of elements whose bits differ."""
    total = unequal = 0
    for (key, mine), (other, his) in zip(bits(ours), bits(theirs), strict=True):
        if key != other:
            sys.exit(f"mergekit wrote {other}, where we wrote {key}")
        total += mine.size
        unequal += int((mine != his).sum())
    return unequal / total


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gb", type=float, default=5.0, help="size of each checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--mergekit", type=Path, help="bin/ of an environment that has it")
    chosen = parser.parse_args()
    scratch = chosen.scratch / "soup-large"
    scratch.mkdir(parents=True)
    try:
        print(json.dumps(measure(chosen, scratch)))
    finally:
        shutil.rmtree(scratch)


def measure(chosen: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Alternate the three, `rounds` times."""
    per_layer = sum(int(np.prod(shape)) for shape in LAYER.values())
    layers = max(round((chosen.gb * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / per_layer), 1)
    mergekit = chosen.mergekit or install_mergekit(scratch)
    models = [make(scratch / name, seed, layers) for seed, name in enumerate("ab", 1)]
    inputs = [file for model in models for file in sorted(model.glob("*.safetensors"))]
    size = sum(file.stat().st_size for file in inputs)
    outs = {name: scratch / f"out-{name}" for name in ("copy", "salsa", "mergekit")}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in outs}
    for _ in range(chosen.rounds):
        for name, python, code, arguments in (
            ("copy", sys.executable, COPY, inputs),
            ("salsa", sys.executable, OURS, models),
            ("mergekit", str(mergekit / "python"), THEIRS, models),
        ):
            if chosen.cold:
                forget(inputs)
            os.sync()  # nobody pays for what another one wrote
            runs[name].append(child(python, code, outs[name], arguments))
            print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
            if name == "copy":
                shutil.rmtree(outs[name])
    middle = lambda name, key: statistics.median(run[key] for run in runs[name])
    ours, copy = middle("salsa", "seconds"), middle("copy", "seconds")
    return {
        "benchmark": "soup_large",
        "bytes_read": size,
        "bytes_written": size // 2,
        "seconds": {name: round(middle(name, "seconds"), 2) for name in runs},
        "seconds_to_disk": {name: round(middle(name, "synced"), 2) for name in runs},
        "cpu_seconds_with_imports": {name: round(middle(name, "cpu"), 2) for name in runs},
        "mergekit_over_salsa": round(middle("mergekit", "seconds") / ours, 2),
        "mergekit_to_disk_over_salsa": round(middle("mergekit", "synced") / ours, 2),
        "share_of_copy_speed": round(copy / ours, 2),
        "copy_gb_per_second": round(1.5 * size / copy / 1e9, 2),
        "peak_mib": {name: round(max(run["peak_mib"] for run in runs[name])) for name in runs},
        "elements_that_differ": differing(outs["salsa"], outs["mergekit"]),
        "cold": chosen.cold,
        "rounds": chosen.rounds,
        "runs": runs,
    }


if __name__ == "__main__":
    main()

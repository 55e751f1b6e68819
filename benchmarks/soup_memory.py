"""A soup of 7B-shaped checkpoints inside a hard memory limit: 13.5 GB each in bf16, 512 MiB for everything.

    sudo python benchmarks/soup_memory.py SCRATCH [--limit-mib 512] [--counts 2 4 8] [--layers 32]

The checkpoints are sparse files in Llama-2-7B's shapes and sharding, with real numbers at the start of every tensor.
The process runs in a memory cgroup (version 1 or 2; making one needs root), where page cache counts too, so the kernel
must be able to take it back. Prints a JSON line: bytes, seconds, the cgroup's peak and the process's peak of private
memory for every number of ingredients. The output is deleted after each.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from salsa.artifacts import EMBEDDED_PATH

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
CHILD = """
import sys, threading, time
peak = 0
def watch():
    global peak
    while True:
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
from salsa import make_soup
make_soup(sys.argv[2:], out=sys.argv[1])
print(peak)
"""


def make(directory: Path, seed: int, layers: int) -> int:
    """Write a sparse checkpoint in two shards; returns its bytes."""
    directory.mkdir(parents=True)
    names = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for n in range(layers):
        names |= {f"model.layers.{n}.{k}.weight": s for k, s in LAYER.items()}
    names |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    keys = list(names)
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        weight_map |= dict.fromkeys(part, name)
        total += write_shard(directory / name, {k: names[k] for k in sorted(part)}, seed)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(EMBEDDED_PATH / "config.json", directory)
    return total


def write_shard(path: Path, names: dict[str, tuple[int, ...]], seed: int) -> int:
    """Holes, but for the first 64 Ki elements of every tensor."""
    header, offset = {}, 0
    for key, shape in names.items():
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    numbers = np.random.default_rng(seed).standard_normal(1 << 16, np.float32)
    data = numbers.astype(ml_dtypes.bfloat16).tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for entry in header.values():
            first, last = entry["data_offsets"]
            file.seek(start + first)
            file.write(data[: last - first])
        file.truncate(start + offset)
    return offset


class MemoryGroup:
    """A cgroup with a hard limit."""

    def __init__(self, limit: int) -> None:
        old = Path("/sys/fs/cgroup/memory")
        self.path = (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"salsa-{os.getpid()}"
        self.path.mkdir()
        first = old.is_dir()
        (self.path / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        self.peak_file = self.path / ("memory.max_usage_in_bytes" if first else "memory.peak")

    def enter(self) -> None:
        """Move the calling process in."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """Most bytes at any time, page cache included."""
        return int(self.peak_file.read_text())


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--limit-mib", type=int, default=512)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--layers", type=int, default=32)
    chosen = parser.parse_args()
    chosen.scratch.mkdir()
    models = [chosen.scratch / f"model-{i}" for i in range(max(chosen.counts))]
    sizes = [make(model, seed, chosen.layers) for seed, model in enumerate(models)]
    rows = []
    for count in chosen.counts:
        group, out = MemoryGroup(chosen.limit_mib * 2**20), chosen.scratch / "soup"
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(out), *map(str, models[:count])],
            preexec_fn=group.enter,
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode != 0:
            sys.exit(f"{count} ingredients: ended with code {done.returncode}")
        rows.append(
            {
                "ingredients": count,
                "seconds": round(time.perf_counter() - started, 1),
                "cgroup_peak_mib": round(group.peak() / 2**20, 1),
                "private_peak_mib": round(int(done.stdout.split()[-1]) / 2**10, 1),
            }
        )
        shutil.rmtree(out)
        group.path.rmdir()
    shutil.rmtree(chosen.scratch)
    print(
        json.dumps(
            {
                "benchmark": "soup_memory",
                "bytes_each": sizes[0],
                "limit_mib": chosen.limit_mib,
                "runs": rows,
            }
        )
    )


if __name__ == "__main__":
    main()

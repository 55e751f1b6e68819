"""Real response tokens per second of salsa's generator and of transformers' `model.generate`, alternately.

    python benchmarks/generation.py [--model DIR] [--prompts FILE] [--rows 32] [--num-prompts 96]

Same model, prompts, temperature, length limit and precision; 32 rows at once on either side: transformers takes batch
after batch, each until its last row ends; salsa lets waiting prompts in. Tokens after EOS do not count. Before anything
is timed, both must say the same at a temperature near 0. Prints one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import draw_prompts, model_directory, say

from salsa.data import Prompt
from salsa.models import LanguageModel, load_tokenizer, sampling_for
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler
from salsa.runtime.sampler.local import left_padded
from salsa.runtime.tracking import quiet_libraries
from salsa.types import Sampling


def ours(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, rows: int, seed: int
) -> list[list[int]]:
    """All prompts in one call."""
    generator = torch.Generator(model.engine.device).manual_seed(seed)
    ids = [prompt.ids for prompt in prompts]
    rollout = LocalSampler(model, rows).generate(ids, sampling, generator).rollout
    return [r[m].tolist() for r, m in zip(rollout.response, rollout.response_mask, strict=True)]


@torch.no_grad()
def theirs(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, rows: int, seed: int
) -> list[list[int]]:
    """Batch after batch, left-padded, as its documentation has it."""
    torch.manual_seed(seed)
    replies = []
    for start in range(0, len(prompts), rows):
        batch = [prompt.ids for prompt in prompts[start : start + rows]]
        prompt, mask = left_padded(batch, sampling.pad_id, model.engine.device)
        drawn = model.backbone.generate(
            prompt,
            attention_mask=mask.long(),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=list(sampling.eos_ids),
            pad_token_id=sampling.pad_id,
        )
        for row in drawn[:, prompt.shape[1] :].tolist():
            end = next((i + 1 for i, t in enumerate(row) if t in sampling.eos_ids), len(row))
            replies.append(row[:end])
    return replies


def _ratio(rates: dict[str, list[float]]) -> float:
    """Median over the rounds of ours over theirs."""
    pairs = zip(rates["salsa"], rates["transformers"], strict=True)
    return statistics.median(mine / his for mine, his in pairs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--prompts")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    args = _arguments()
    quiet_libraries()
    engine = Engine.create(args.precision)
    path = model_directory(args.model)
    prompts = draw_prompts(args.prompts, path, args.num_prompts, seed=0)
    model = LanguageModel.load(path, engine)
    tokenizer = load_tokenizer(path)
    sampling = sampling_for(path, tokenizer, max_new_tokens=args.new_tokens, temperature=1.0)
    greedy = Sampling(12, 1e-4, sampling.eos_ids, sampling.pad_id)
    pairs = zip(
        ours(model, prompts[:8], greedy, 8, 0),
        theirs(model, prompts[:8], greedy, 8, 0),
        strict=True,
    )
    same = sum(mine == his for mine, his in pairs)
    say(f"greedy replies that agree: {same} of 8 (ties in bf16 may differ)")
    rates: dict[str, list[float]] = {"salsa": [], "transformers": []}
    cpu_rates: dict[str, list[float]] = {"salsa": [], "transformers": []}
    lengths: list[int] = []
    for seed in range(args.rounds):
        for name, speak in (("salsa", ours), ("transformers", theirs)):
            start, cpu_start = time.perf_counter(), time.process_time()
            replies = speak(model, prompts, sampling, args.rows, seed)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            rates[name].append(sum(map(len, replies)) / seconds)
            cpu_rates[name].append(sum(map(len, replies)) / cpu_seconds)
            lengths += map(len, replies)
            say(
                f"{name}: {sum(map(len, replies))} tokens in {seconds:.1f} s, {cpu_seconds:.1f} s of CPU"
            )
    result = {
        "benchmark": "generation",
        "model": Path(path).name,
        "precision": engine.precision,
        "rows": args.rows,
        "num_prompts": args.num_prompts,
        "new_tokens": args.new_tokens,
        "mean_length": statistics.mean(lengths),
        "share_at_limit": statistics.mean(n == args.new_tokens for n in lengths),
        "greedy_agreement": same / 8,
        "tokens_per_second": rates,
        "ratio": _ratio(rates),
        "tokens_per_cpu_second": cpu_rates,
        "cpu_ratio": _ratio(cpu_rates),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""TRL's half of ppo_vs_trl.py, run by a Python that has trl==1.12.0 and no salsa.

    python trl_side.py speed JOB.json      times and peak memory of `trl.experimental.ppo.PPOTrainer`, as a JSON line
    python trl_side.py loss JOB.json       what the trainer computes on one fixed off-policy batch, into JOB's `out`

The trainer itself is untouched: the loss is read off by recording what its own helper functions return.
"""

import json
import os
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """Seconds of each update: from the end of one to the end of the next."""

    def __init__(self):
        self.stops = []
        self.cpu_stops = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Note the time."""
        self.stops.append(time.perf_counter())
        self.cpu_stops.append(time.process_time())

    on_step_end = on_train_begin


def make_trainer(job, **options):
    """The trainer of a job: fp32 weights, bf16 autocast if `job.bf16`, a critic and a reward model of their own."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32) for _ in range(2)
    )
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(job["scorer"], dtype=torch.float32)
        for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(job["pad_id"])
    for model in (policy, reference, reward, critic):
        model.config.pad_token_id = job["pad_id"]
    episodes, micro = len(job["prompts"]), job["microbatch"]
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        bf16=job["bf16"],
        use_cpu=not torch.cuda.is_available(),
        seed=job["seed"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=episodes // micro,
        num_mini_batches=1,
        response_length=job["new_tokens"],
        temperature=job["temperature"],
        stop_token="eos",
        kl_coef=job["kl_coef"],
        vf_coef=1.0,
        adam_beta2=0.95,
        gradient_checkpointing=job["gradient_checkpointing"],
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **options,
    )
    clock = Clock()
    trainer = PPOTrainer(
        config,
        tokenizer,
        policy,
        reference,
        reward,
        Dataset.from_dict({"input_ids": job["prompts"]}),
        critic,
        callbacks=[clock],
    )
    return trainer, clock


def peak_gb():
    """Most memory: of a GPU what torch allocated, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def speed(job):
    """One update to warm up, then `job.updates` that count; every update sees the same prompts."""
    rows = []
    trainer, clock = make_trainer(
        job,
        total_episodes=(job["updates"] + 1) * len(job["prompts"]),
        num_ppo_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
    )
    trainer.log = lambda metrics, *args, **kwargs: rows.append(metrics)
    trainer.train()
    seconds, cpu_seconds = (
        [b - a for a, b in pairwise(stops)] for stops in (clock.stops, clock.cpu_stops)
    )
    return {
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "peak_gb": peak_gb(),
        "kl": [row["objective/kl"] for row in rows],
    }


class Recorder:
    """Stands in for the trainer's helpers: gives the fixed batch, adds its noise, notes what the real ones return."""

    HELPERS = (
        "batch_generation",
        "selective_log_softmax",
        "get_reward",
        "masked_mean",
        "masked_whiten",
    )

    def __init__(self, given, temperature):
        self.given, self.temperature = given, temperature
        self.real = {name: getattr(ppo_trainer, name) for name in self.HELPERS}
        self.logprobs, self.values, self.means = [], [], []
        self.whitened = None
        for name in self.HELPERS:
            setattr(ppo_trainer, name, getattr(self, name))

    def batch_generation(self, model, queries, size, pad_id, config):
        """The given responses instead of new ones."""
        sequences = torch.cat([queries, self.given["response"]], dim=1)
        output = ppo_trainer.forward(model, sequences, pad_id)
        return sequences, output.logits[:, queries.shape[1] - 1 : -1] / self.temperature

    def selective_log_softmax(self, logits, index):
        """First the rollout's logprobs, which get noise; then the reference's; then the update's."""
        logprobs = self.real["selective_log_softmax"](logits, index)
        if not self.logprobs:
            logprobs = logprobs + self.given["logprob_noise"]
        self.logprobs.append(logprobs.detach().clone())
        return logprobs

    def get_reward(self, model, sequences, pad_id, context):
        """First the critic on the rollout, which gets noise; then the reward model, whose scores are given."""
        full, score, lengths = self.real["get_reward"](model, sequences, pad_id, context)
        if self.values:
            return full, self.given["scores"].clone(), lengths
        full = full.clone()
        full[:, context - 1 : -1, 0] += self.given["value_noise"]
        self.values.append(full[:, context - 1 : -1, 0].clone())
        return full, score, lengths

    def masked_mean(self, values, mask, axis=None):
        """After whitening: the value loss, its clip fraction, the policy loss."""
        result = self.real["masked_mean"](values, mask, axis)
        self.means.append(result.detach())
        return result

    def masked_whiten(self, values, mask, shift_mean=True):
        """The advantages."""
        result = self.real["masked_whiten"](values, mask, shift_mean)
        self.whitened = (values.clone(), result.clone(), mask)
        self.means.clear()
        return result


def loss(job):
    """Advantages, returns, policy and value loss of the real `train()` on a batch that is given.

    Old logprobs and values get the job's noise, so that ratios differ from 1 and clipping bites; the learning rate
    is 0, so that nothing else changes.
    """
    given = torch.load(job["batch"])
    recorder = Recorder(given, job["temperature"])
    trainer, _ = make_trainer(
        job, total_episodes=len(job["prompts"]), num_ppo_epochs=1, learning_rate=0.0
    )
    trainer.log = lambda *args, **kwargs: None
    trainer.dataloader = [{"input_ids": given["prompt"]}]
    ppo_trainer.np.random.permutation = lambda count: torch.arange(count).numpy()
    trainer.train()
    raw, whitened, mask = recorder.whitened
    value_loss, _, policy_loss = recorder.means[:3]
    figures = {
        "old_logprobs": recorder.logprobs[0],
        "old_values": recorder.values[0],
        "raw_advantages": raw,
        "advantages": whitened,
        "mask": mask,
        "value_loss": value_loss / 2,
        "policy_loss": policy_loss,
    }
    torch.save(figures, job["out"])
    return {"written": job["out"]}


def main():
    """Entry point."""
    job = json.loads(Path(sys.argv[2]).read_text())
    torch.manual_seed(job["seed"])
    result = {"speed": speed, "loss": loss}[sys.argv[1]](job)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()

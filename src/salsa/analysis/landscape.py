"""What lies between models and beyond them: one resident model takes the weights of each place in turn.

    line    θ(α) = θ_0 + α·(θ_1 − θ_0)
    plane   θ(x, y) = θ_0 + x·u + y·v,  u = θ_1 − θ_0,  v = (θ_2 − θ_0) − c·u, orthogonal to u (Garipov et al. 2018)

Weights are added up in float64 and rounded once, as a soup's are. Every place answers the same prompts with the same
random numbers, so that differences between places are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from salsa.analysis.places import Geometry, Place
from salsa.analysis.sampling import Row, by_batch, rollout_of
from salsa.data import SFT_COLUMNS, Prompt, as_prompt, describe, load_prompts, load_rows, sft_rows
from salsa.errors import CheckpointError
from salsa.models import LanguageModel, load_tokenizer, sampling_for
from salsa.rewards import Scorer, sum_of
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler
from salsa.runtime.tracking import round_metric
from salsa.soup.blend import weighted_sum
from salsa.soup.methods import linear
from salsa.stages.jobs import LandscapeJob
from salsa.types import Rollout, Sampling, rows_of

Weights = Mapping[str, Tensor]

ROWS = 64
"""Replies per forward pass."""


def write_places(job: LandscapeJob, directory: Path, engine: Engine) -> None:
    """`places.jsonl`: a row a place, its coordinates, every reply's scores, KLs and length, and the validation loss.

    Raises:
        CheckpointError: the models differ in shape, or three of them lie on one line.
    """
    path = job.models[0].path
    full = replace(engine, precision="fp32")  # the difference of rounded weights is mostly rounding
    parts = [dict(LanguageModel.load(model.path, full).weights()) for model in job.models]
    geometry = geometry_of(parts, [str(model.path) for model in job.models])
    resident = LanguageModel.load(path, engine, moves=True)
    tokenizer = load_tokenizer(path)
    look = _Look(
        prompts=load_prompts(job.asked.prompts, tokenizer, max_tokens=job.asked.max_prompt_tokens),
        sampling=sampling_for(
            path,
            tokenizer,
            max_new_tokens=job.asked.max_new_tokens,
            temperature=job.asked.temperature,
        ),
        scorers={name: sum_of(reward.load(engine)) for name, reward in job.rewards.items()},
        yardsticks={n: LanguageModel.load(c.path, engine) for n, c in job.kl_to.items()},
        job=job,
        model=resident,
    )

    def work(_: int, places: Sequence[Place]) -> list[Row]:
        resident.put(mixed(parts, places[0].weights))
        return [{"at": list(places[0].at)} | look.row()]

    by_batch(
        directory, "places.jsonl", job.label, geometry.places(job.alphas), 1, work, unit="places"
    )


def geometry_of(parts: Sequence[Weights], names: Sequence[str]) -> Geometry:
    """How the models lie to each other.

    Raises:
        CheckpointError: they differ in shape, two are equal, or three lie on one line.
    """
    shapes = [{name: tuple(weight.shape) for name, weight in part.items()} for part in parts]
    for other, name in zip(shapes[1:], names[1:], strict=True):
        if other != shapes[0]:
            raise CheckpointError(
                f"{name} and {names[0]} differ in their tensors, so there is no line between them. Give models of one "
                "architecture."
            )
    deltas = [
        {name: part[name].double() - parts[0][name].double() for name in part} for part in parts[1:]
    ]

    def dot(a: Weights, b: Weights) -> float:
        return sum(float((a[name] * b[name]).sum()) for name in a)

    gram = np.array([[dot(a, b) for b in deltas] for a in deltas])
    if not gram[0, 0] > 0:
        raise CheckpointError(f"{names[0]} and {names[1]} are equal. Give two different models.")
    if len(deltas) == 1:
        return Geometry(2, 0.0, 0.0)
    along = gram[0, 1] / gram[0, 0]
    across = gram[1, 1] - along * gram[0, 1]
    if across <= 1e-6 * gram[1, 1]:
        raise CheckpointError(
            f"{', '.join(names)} lie on one line, so they span no plane. Give a third model that lies beside it."
        )
    return Geometry(3, float(along), float(np.sqrt(across / gram[0, 0])))


def mixed(parts: Sequence[Weights], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ w_i θ_i by the soup's own arithmetic: added up in float64 in the models' order, rounded once."""
    total = {}
    for name, weight in parts[0].items():
        values = np.stack([part[name].cpu().numpy().ravel() for part in parts]).astype(np.float64)
        result, room = np.empty_like(values[:2])
        weighted_sum(values, linear(weights), result, room)
        total[name] = torch.from_numpy(result.reshape(weight.shape)).float()
    return total


class _Look:
    """What is measured at one place."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        scorers: Mapping[str, Scorer],
        yardsticks: Mapping[str, LanguageModel],
        job: LandscapeJob,
        model: LanguageModel,
    ) -> None:
        self.sampling, self.scorers, self.yardsticks = sampling, scorers, yardsticks
        self.job, self.model = job, model
        self.tokenizer = load_tokenizer(job.models[0].path)
        self.prompts = [prompt for prompt in prompts for _ in range(job.asked.num_samples)]
        self.validation = self._validation()

    def row(self) -> Row:
        """Columns of all replies, prompt by prompt, and the loss of the validation rows."""
        generator = self.model.engine.generator(self.job.asked.seed)
        sampler = LocalSampler(self.model)
        ids = [prompt.ids for prompt in self.prompts]
        rollout = sampler.generate(ids, self.sampling, generator).rollout
        texts = rollout.texts(self.tokenizer)
        columns = {name: scorer(self.prompts, texts) for name, scorer in self.scorers.items()}
        passes = [(rows, self.model.states(rows)) for rows in _chunks(rollout)]
        for name, other in self.yardsticks.items():
            columns[f"kl_to_{name}"] = [
                kl
                for rows, states in passes
                for kl in self.model.kl_to(other, rows, self.sampling.temperature, states)
                .sum(dim=1)
                .tolist()
            ]
        columns["length"] = rollout.lengths.float().tolist()
        rounded = {name: [round_metric(v) for v in values] for name, values in columns.items()}
        return {"columns": rounded, "loss": self._loss()}

    def _validation(self) -> Rollout | None:
        """The validation rows as prompts and replies, ended by EOS."""
        source = self.job.validation
        if source is None:
            return None
        rows = sft_rows(load_rows(source, SFT_COLUMNS), self.tokenizer, describe(source))
        prompts = [as_prompt({"prompt": row["prompt"]}, self.tokenizer).ids for row in rows]
        texts = [
            reply if isinstance(reply := row["completion"], str) else reply[-1]["content"]
            for row in rows
        ]
        end = self.sampling.eos_ids[0]
        replies = [
            (*self.tokenizer(text, add_special_tokens=False)["input_ids"], end) for text in texts
        ]
        return rollout_of(prompts, replies, self.sampling.pad_id, self.model.engine.device)

    @torch.no_grad()
    def _loss(self) -> list[float] | None:
        """Mean negative log-likelihood per token of each validation row, in nats."""
        if self.validation is None:
            return None
        return [
            round_metric(loss)
            for rows in _chunks(self.validation)
            for loss in (-self.model.logprobs(rows, 1.0).sum(dim=1) / rows.lengths).tolist()
        ]


def _chunks(rollout: Rollout) -> list[Rollout]:
    """ROWS at a time: the attention of a packed pass grows with the square of its tokens."""
    return [rows_of(rollout, slice(at, at + ROWS)) for at in range(0, len(rollout), ROWS)]

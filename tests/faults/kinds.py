"""The kinds of faults: the stage that is broken, how, and from which stage on a run has to be computed anew.

A fault changes the recipe, or replaces a function of the product while the run lasts. The doctor looks at the run
directory afterwards, with the product as it is.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import salsa.evaluate.scores
import salsa.models.language
import salsa.objectives
import salsa.preferences
import salsa.reward
import salsa.rl
import salsa.rl_models
import salsa.sft
from salsa.models import LanguageModel, RewardModel, ValueModel
from salsa.rl_models import Learner
from salsa.runtime.engine import Engine
from salsa.runtime.sampler import LocalSampler

ORDER = ("sft", "preferences", "reward", "rl", "eval")
"""Stages of a run: a fault that begins at one leaves those before it as they were."""

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Fault:
    """One kind."""

    name: str
    stage: str
    """Which the doctor should name."""
    begins: str
    """The first of ORDER that differs from a healthy run."""
    overrides: tuple[str, ...] = ()
    patches: tuple[tuple[Any, str, Change], ...] = ()
    """(where, name, from the original to what takes its place)."""

    @contextmanager
    def planted(self) -> Iterator[None]:
        """While this lasts, the product has the fault."""
        before = [(where, name, getattr(where, name)) for where, name, _ in self.patches]
        try:
            for (where, name, change), (_, _, original) in zip(self.patches, before, strict=True):
                setattr(where, name, change(original))
            yield
        finally:
            for where, name, original in before:
                setattr(where, name, original)


def _pairs_changed(change: Callable[[dict, random.Random], dict]) -> tuple:
    """`label_pairs` whose rows are changed afterwards."""

    def patch(label_pairs):
        def labelled(*arguments):
            rng = random.Random(0)
            return [change(row, rng) for row in label_pairs(*arguments)]

        return labelled

    return ((salsa.preferences, "label_pairs", patch),)


def _flipped(row: dict, rng: random.Random) -> dict:
    if rng.random() < 0.4:
        return row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    return row


def _longer(row: dict, rng: random.Random) -> dict:
    a, b = sorted((row["chosen"], row["rejected"]), key=lambda text: len(text.split()))
    return row | {"chosen": b, "rejected": a}


def _equal(row: dict, rng: random.Random) -> dict:
    return row | {"rejected": row["chosen"]} if rng.random() < 0.25 else row


def _bare_rows(sft_rows):
    """SFT rows as plain text: no template."""

    def bare(*arguments, **options):
        words = lambda value: (
            value if isinstance(value, str) else "\n".join(m["content"] for m in value)
        )
        rows = sft_rows(*arguments, **options)
        return [{"prompt": words(r["prompt"]), "completion": words(r["completion"])} for r in rows]

    return bare


def _exchanged_rows(preference_rows):
    """Chosen and rejected exchanged on their way into the trainer; what is held back is read rightly later."""

    def exchanged(*arguments):
        rows = preference_rows(*arguments)
        return [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]

    return exchanged


def _without_eos(sft_trainer_loss):
    """The end of a reply does not count in the loss."""

    def loss(self, model, inputs, *arguments, **options):
        end = self.processing_class.eos_token_id
        labels = inputs["labels"].masked_fill(inputs["labels"] == end, -100)
        return sft_trainer_loss(self, model, inputs | {"labels": labels}, *arguments, **options)

    return loss


def _one_seed(common_arguments):
    return lambda *arguments: common_arguments(*arguments) | {"seed": 0}


def _scores(change: Callable[..., list[float]]) -> tuple:
    """The reward model as a scorer, changed; training and evaluation alike."""
    patch = lambda call: (
        lambda self, prompts, replies: change(
            lambda p, r: call(self, p, r), list(prompts), list(replies)
        )
    )
    return ((RewardModel, "__call__", patch),)


def _rolled(call, prompts, replies):
    scores = call(prompts, replies)
    return scores[-1:] + scores[:-1]


def _wrong_turn(call, prompts, replies):
    return call(prompts, [p.messages[-1]["content"] for p in prompts])


def _by_length(call, prompts, replies):
    scores = call(prompts, replies)
    return [s + 0.1 * len(r.split()) for s, r in zip(scores, replies, strict=True)]


def _constant(call, prompts, replies):
    return [0.5] * len(replies)


def _rollouts(change: Callable[[Any, Any], Any]) -> tuple:
    """Rollouts changed on their way from the sampler to the loop."""

    def patch(collect_rollout):
        def collected(policy, source, *arguments):
            generation = collect_rollout(policy, source, *arguments)
            return change(generation, source)

        return collected

    return ((salsa.rl, "collect_rollout", patch),)


def _mask_without_eos(generation, source):
    rollout = generation.rollout
    last = rollout.lengths - 1
    mask = rollout.response_mask.clone()
    rows = (rollout.ended(source.sampling.eos_ids) & (last > 0)).nonzero().squeeze(1)
    mask[rows, last[rows]] = False
    return _masked(generation, rollout.response, mask)


def _mask_with_padding(generation, source):
    rollout = generation.rollout
    end = source.sampling.eos_ids[0]
    response = rollout.response.masked_fill(~rollout.response_mask, end)
    return _masked(generation, response, torch.ones_like(rollout.response_mask))


def _masked(generation, response, mask):
    rollout = replace(generation.rollout, response=response, response_mask=mask)
    return replace(generation, rollout=rollout, logprobs=generation.logprobs * mask)


def _at_one(logits):
    """Logits as if the temperature were 1, wherever logprobs are computed; the sampler divides by it itself."""
    return lambda model, hidden, temperature: logits(model, hidden, 1.0)


class OtherSampler:
    """Samples from a copy of the policy: one in bf16 at every call, or the one that was there at the start."""

    def __init__(self, policy: LanguageModel, *, bf16: bool) -> None:
        self.policy, self.bf16, self.first = policy, bf16, copy.deepcopy(policy.backbone)

    def generate(self, prompts, sampling, generator):
        engine = Engine.create("bf16") if self.bf16 else self.policy.engine
        backbone = copy.deepcopy(self.policy.backbone if self.bf16 else self.first)
        sampler = LocalSampler(LanguageModel(backbone, engine))
        return replace(
            sampler.generate(prompts, sampling, generator), version=self.policy.version()
        )


def _models(change: Callable[..., None]) -> tuple:
    """The models of an RL run, changed after they were loaded."""

    def patch(load):
        def loaded(setup, engine):
            models, source = load(setup, engine)
            change(models, setup, engine)
            return models, source

        return loaded

    return ((salsa.rl, "load", patch),)


def _stale_reference(models, setup, engine):
    models.reference.models[:] = [LanguageModel.load(setup.kl_to["base"].path, engine)]


def _policy_as_reference(models, setup, engine):
    models.reference.models[:] = [models.policy]


def _penalty_turned(token_rewards):
    return lambda *arguments, kl_coef, **options: token_rewards(
        *arguments, kl_coef=-kl_coef, **options
    )


def _score_early(token_rewards):
    """The score one token before the last."""

    def early(scores, logprobs, ref_logprobs, mask, **options):
        penalties = token_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, mask, **options)
        place = (mask.sum(dim=1) - 2).clamp(min=0)
        return penalties.scatter_add(1, place[:, None], scores[:, None])

    return early


def _turned_round(estimate_advantages):
    def turned(*arguments, **options):
        advantages, returns = estimate_advantages(*arguments, **options)
        return -advantages, returns

    return turned


def _one_late(values):
    """Values read off after the token; the last one of a reply stays where it is."""

    def late(self, rollout):
        right = values(self, rollout)
        next_ones = torch.cat([right[:, 1:], torch.zeros_like(right[:, :1])], dim=1)
        inner = torch.cat(
            [rollout.response_mask[:, 1:], torch.zeros_like(rollout.response_mask[:, :1])], dim=1
        )
        return torch.where(inner, next_ones, right)

    return late


def _no_step(kind: type) -> tuple:
    """Learners of that kind compute gradients and do not step."""

    def patch(step):
        def skipped(self, max_grad_norm):
            if not isinstance(self.model, kind):
                return step(self, max_grad_norm)
            return torch.nn.utils.clip_grad_norm_(self.model.trained().values(), max_grad_norm)

        return skipped

    return ((Learner, "step", patch),)


def _evaluated_rolled(sum_of):
    """Scores of the evaluation, shifted by one row within each batch."""

    def rolled(scorers):
        scorer = sum_of(scorers)

        def shifted(prompts, replies):
            scores = scorer(prompts, replies)
            return scores[-1:] + scores[:-1]

        return shifted

    return rolled


def _trainer() -> Any:
    import trl

    return trl.SFTTrainer


_NO_PREFERENCES = (
    "preferences=null",
    'reward={functions: [{call: "tests.faults.inputs:opposite"}]}',
)

FAULTS = (
    Fault("data: template applied twice", "data", "sft", ("sft.dataset.call=tests.faults.inputs:sft_rendered",)),
    Fault("data: template not applied", "data", "sft", (), ((salsa.sft, "sft_rows", _bare_rows),)),
    Fault("data: SFT replies cut", "data", "sft", ("sft.max_length=24",)),
    Fault("data: 40 % of labels flipped", "data", "preferences", (), _pairs_changed(_flipped)),
    Fault("data: labels follow length", "data", "preferences", (), _pairs_changed(_longer)),
    Fault("data: a quarter of the pairs equal", "data", "preferences", (), _pairs_changed(_equal)),
    Fault("data: duplicated RL prompts", "data", "rl", ("rl.prompts.call=tests.faults.inputs:few_prompts",)),
    Fault("data: evaluated on RL prompts", "data", "eval", ("eval.prompts.call=salsa.demo:rl_prompts",)),
    Fault("sft: EOS masked out", "sft", "sft", (), ((_trainer(), "compute_loss", _without_eos),)),
    Fault("sft: equal seeds", "sft", "sft", (), ((salsa.sft, "common_arguments", _one_seed),)),
    Fault("sft: too long", "sft", "sft", ("sft.epochs=8",)),
    Fault("sft: learning rate x 30", "sft", "sft", ("sft.learning_rate=1.5e-2",)),
    Fault("sft: never steps", "sft", "sft", ("sft.learning_rate=1.0e-30",)),
    Fault(
        "reward: chosen and rejected exchanged", "reward", "reward", (),
        ((salsa.reward, "preference_rows", _exchanged_rows),),
    ),
    Fault("reward: shifted by one row", "reward", "rl", (), _scores(_rolled)),
    Fault("reward: of the wrong turn", "reward", "rl", (), _scores(_wrong_turn)),
    Fault("reward: biased by length", "reward", "rl", (), _scores(_by_length)),
    Fault("reward: constant", "reward", "rl", (), _scores(_constant)),
    Fault("rollout: EOS masked out", "rollout", "rl", (), _rollouts(_mask_without_eos)),
    Fault("rollout: pad = eos miscounted", "rollout", "rl", (), _rollouts(_mask_with_padding)),
    Fault("rollout: temperature in sampling only", "rollout", "rl", (), ((salsa.models.language, "_logits", _at_one),)),
    Fault(
        "rollout: bf16 sampler, fp32 trainer", "rollout", "rl", (),
        ((salsa.rl_models, "LocalSampler", lambda _: lambda policy: OtherSampler(policy, bf16=True)),),
    ),
    Fault(
        "rollout: stale weights", "rollout", "rl", (),
        ((salsa.rl_models, "LocalSampler", lambda _: lambda policy: OtherSampler(policy, bf16=False)),),
    ),
    Fault("kl: sign turned round", "kl", "rl", (), ((salsa.objectives, "token_rewards", _penalty_turned),)),
    Fault("kl: stale reference", "kl", "rl", (), _models(_stale_reference)),
    Fault("kl: reference is the policy", "kl", "rl", (), _models(_policy_as_reference)),
    Fault("kl: coefficient x 100", "kl", "rl", ("rl.kl_coef=10",)),
    Fault("kl: coefficient / 100", "kl", "rl", ("rl.kl_coef=0.001",)),
    Fault("critic: value one position late", "critic", "rl", (), ((ValueModel, "values", _one_late),)),
    Fault("critic: never trained", "critic", "rl", (), _no_step(ValueModel)),
    Fault(
        "advantages: score one token early", "advantages", "rl", (),
        ((salsa.objectives, "token_rewards", _score_early),),
    ),
    Fault(
        "advantages: turned round", "advantages", "rl", (),
        ((salsa.objectives, "estimate_advantages", _turned_round),),
    ),
    Fault("optimisation: learning rate x 30", "optimisation", "rl", ("rl.learning_rate=4.5e-3",)),
    Fault("optimisation: policy never steps", "optimisation", "rl", (), _no_step(LanguageModel)),
    Fault("hacking: reward against gold", "hacking", "rl", _NO_PREFERENCES),
    Fault(
        "evaluation: scores shifted by one row", "evaluation", "eval", (),
        ((salsa.evaluate.scores, "sum_of", _evaluated_rolled),),
    ),
)  # fmt: skip

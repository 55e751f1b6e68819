"""From a run directory, or a recipe alone, to the evidence that the gates judge.

Forward passes are few: SAMPLE rows of each kind, through `salsa.doctor.replay`. torch is imported only for them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from salsa.artifacts import Checkpoint, read_jsonl
from salsa.config import Recipe, RLConfig
from salsa.config.expressions import parse_model, text_of
from salsa.data import (
    PREFERENCE_COLUMNS,
    Prompt,
    Row,
    describe,
    kept_back,
    load_rows,
    preference_rows,
)
from salsa.doctor import reward as reward_gates
from salsa.doctor import rollout as rollout_gates
from salsa.doctor.evidence import (
    SFT,
    Data,
    Episodes,
    Evidence,
    Likelihood,
    Pairs,
    Reward,
    RLRun,
    Samples,
)
from salsa.doctor.files import RunFiles
from salsa.doctor.sources import READ, SAMPLE, Ids, Sources, data_of, likely_rows, shown_row, words
from salsa.runtime.tracking import quiet_libraries
from salsa.stages.directory import Stage, policy_label
from salsa.trace import PER_TOKEN, read_trace


def before(recipe: Recipe) -> Evidence:
    """The evidence of a recipe's inputs alone: data and lengths, nothing trained."""
    from salsa.artifacts import resolve
    from salsa.models import load_tokenizer

    quiet_libraries()
    model = recipe.model
    path = resolve(model.path, revision=model.revision)
    tokenizer = load_tokenizer(path, gguf_file=model.gguf_file, chat_template=model.chat_template)
    pairs = None
    if recipe.preferences is not None and recipe.preferences.dataset is not None:
        source = recipe.preferences.dataset
        rows = load_rows(source, PREFERENCE_COLUMNS)[:READ]
        pairs = preference_rows(rows, tokenizer, describe(source))
    data = data_of(recipe, Sources(tokenizer), pairs)
    return Evidence(
        recipe.name, data, not_measured=("everything after the data: nothing is trained yet",)
    )


def after(run: RunFiles, *, largest: int | None = None) -> Evidence:
    """The evidence of a run, as far as it got; without forward passes where the base has more than `largest` bytes."""
    from salsa.doctor import replay

    try:
        return _after(run, largest)
    finally:
        replay.forget()


def _after(run: RunFiles, largest: int | None) -> Evidence:
    recipe, missing = run.recipe, []
    base = run.model("base")
    if base is None:
        return Evidence(recipe.name, not_measured=("everything: the base model is not there",))
    from salsa.models import load_tokenizer

    quiet_libraries()
    passes = (
        largest is None or sum(f.stat().st_size for f in base.path.glob("*.safetensors")) <= largest
    )
    if not passes:
        missing.append(
            "what needs a forward pass: the models are large (salsa doctor RUN loads them)"
        )
    tokenizer = load_tokenizer(base.path)
    stage = run.stages.get("preferences")
    pairs = None
    if stage is not None:
        file = stage.path / "pairs.jsonl"
        pairs = preference_rows(read_jsonl(file), tokenizer, str(file))
    sources = Sources(tokenizer)
    data = data_of(recipe, sources, pairs)
    samples = _samples(run, sources, passes)
    sft = _sft(run, base, data, sources, samples, passes)
    if sft is None:
        missing.append("SFT: no model is there")
    reward = _reward(run, data, pairs) if passes else None
    if reward is None and passes:
        missing.append("accuracy of the reward: no reward model was trained here")
    runs = _runs(run, len(tokenizer))
    episodes = _episodes(run, sources, passes)
    unfinished = [one.name for one in runs if one.unfinished]
    if unfinished:
        missing.append(f"what {', '.join(unfinished)} had not come to: not finished")
    if not runs:
        missing.append("RL: no arm has been trained by it")
    elif not episodes:
        missing.append("single episodes: the RL stages kept no trace (made by an older version)")
    if not samples:
        missing.append("evaluation: nothing has been evaluated")
    missing.append(
        "the same reward learned from another half of the pairs: no second reward model is trained"
    )
    num_eval = len(samples[0].prompts) * len(recipe.rl.seeds) if samples else 0
    if not num_eval:
        evals = next((s for s in data.sources if s.role == "eval"), None)
        num_eval = len(evals.prompts) * len(recipe.rl.seeds) if evals else 1
    return Evidence(
        recipe.name, data, sft, reward, episodes, runs, samples, recipe.eval.baseline, recipe.eval.score_names,
        num_eval, missing,
    )  # fmt: skip


def _sft(
    run: RunFiles,
    base: Checkpoint,
    data: Data,
    sources: Sources,
    samples: Sequence[Samples],
    passes: bool,
) -> SFT | None:
    from salsa.doctor import replay

    recipe = run.recipe
    models = [run.model(f"sft[{index}]") for index in range(recipe.sft.count)]
    if any(model is None for model in models):
        return None
    there = [model for model in models if model is not None]
    digests = [run.digest_now(model) for model in there]
    ended = next((s.columns["ended"][0] for s in samples if not s.trained), None)
    if text_of(parse_model(recipe.eval.shown)) != "sft[0]":
        ended = None
    limit = recipe.eval.max_new_tokens or recipe.rl.max_new_tokens
    expected = (
        float(np.mean(np.array(data.sft_reply_tokens) <= limit)) if data.sft_reply_tokens else 1.0
    )
    plain = SFT(
        {}, [{} for _ in there], digests, base.digest, ended=ended, expected_ends=expected, trained=False
    )  # fmt: skip
    if recipe.sft.dataset is None or not passes:
        return plain
    tokenizer = sources.tokenizer
    rows = likely_rows(recipe.sft.dataset, sources)
    kinds = {name: [shown_row(row, tokenizer) for row in own] for name, own in rows.items()}

    def likelihood(model: Any) -> dict[str, Likelihood]:
        found = {}
        for name, shown in kinds.items():
            prompts, replies = zip(*shown, strict=True)
            found[name] = Likelihood(*replay.nll(replay.logprobs(model, prompts, replies)))
        return found

    measured = [likelihood(replay.language_model(model.path)) for model in there]
    soup = recipe.soup.ingredients
    pair = (soup[0], soup[1]) if len(soup) > 1 else (0, len(there) - 1)
    middle = None
    if digests[pair[0]] != digests[pair[1]]:
        middle = likelihood(replay.average([there[i].path for i in pair]))
    original = replay.language_model(base.path)
    return replace(
        plain,
        base=likelihood(original),
        models=measured,
        midpoint=middle,
        ends=pair,
        renderings=_renderings(rows["seen"], tokenizer, replay.language_model(there[0].path)),
        base_renderings=_renderings(rows["seen"], tokenizer, original),
        trained=True,
        vocabulary=int(original.config.get_text_config().vocab_size),
    )


def _renderings(rows: Sequence[Row], tokenizer: Any, model: Any) -> dict[str, np.ndarray]:
    from salsa.doctor import replay

    if not tokenizer.chat_template or not isinstance(rows[0]["prompt"], list):
        return {}
    found = {}
    for name in ("template", "twice", "bare"):
        prompts, replies = zip(*[shown_row(row, tokenizer, name) for row in rows], strict=True)
        found[name] = replay.nll(replay.logprobs(model, prompts, replies))[0]
    return found


def _reward(run: RunFiles, data: Data, pairs: Sequence[Row] | None) -> Reward | None:
    from salsa.doctor import replay

    config, model = run.recipe.reward, _proxy(run)
    if model is None or not config.trains or pairs is None:
        return None
    prompts = [pair["prompt"] for pair in pairs]
    back, rest = kept_back(prompts, config.holdout, config.split_seed, config.holdout_prompts)
    held_out, seen = back[: 4 * SAMPLE], rest[: 2 * SAMPLE]
    trained = {repr(prompts[i]) for i in rest}
    known = sum(repr(prompts[i]) in trained for i in held_out)

    def scored(rows: Sequence[int]) -> np.ndarray:
        if not rows:
            return np.zeros((0, 2))
        sides = []
        for side in ("chosen", "rejected"):
            shown = [
                (_messages(pairs[i]["prompt"]), words(pairs[i]["prompt"]), words(pairs[i][side]))
                for i in rows
            ]
            sides.append(replay.scores(model.path, shown))
        return np.stack(sides, axis=1)

    return Reward(scored(held_out), scored(seen), _ceiling(data.pairs, held_out), known)


def _ceiling(pairs: Pairs | None, numbers: Sequence[int]) -> float | None:
    """Accuracy on these pairs of someone who knows the labeller's score."""
    if pairs is None or pairs.scores is None:
        return None
    d = np.diff(pairs.scores[[i for i in numbers if i < len(pairs.scores)]], axis=1)
    return float((1 / (1 + np.exp(-np.abs(d) / pairs.noise))).mean()) if len(d) else None


def _messages(prompt: Any) -> Any:
    return prompt if isinstance(prompt, list) else None


def _rl_stages(run: RunFiles) -> list[tuple[str, int, RLConfig, Stage]]:
    found = []
    for arm in run.recipe.rl.arms:
        config = run.recipe.rl.config_of(arm)
        for seed in run.recipe.rl.seeds:
            stage = run.trained(policy_label(arm, seed))
            if stage is not None and stage.metrics and isinstance(config, RLConfig):
                found.append((arm, seed, config, stage))
    return found


def _runs(run: RunFiles, vocabulary: int) -> list[RLRun]:
    from salsa.doctor import replay

    found = []
    for arm, seed, config, stage in _rl_stages(run):
        rule = run.recipe.rl.arms[arm].rule
        init, critic_init = run.model(run.recipe.rl.arms[arm].init), _critic_init(run, arm, config)
        reference = run.model(rule.models[0]) if len(rule.models) == 1 and not rule.moves else None
        critic = stage.path / "critic"
        found.append(
            RLRun(
                f"{arm} seed {seed}",
                arm,
                stage.metrics,
                config.model_dump(),
                stage.record.get("precision", "fp32"),
                policy_moved=replay.weights_differ(stage.path, init.path)
                if init and (stage.path / "model.safetensors").exists()
                else None,
                critic_moved=replay.weights_differ(critic, critic_init.path)
                if critic_init and critic.is_dir()
                else None,
                pulls=rule.pulls,
                named_reference=run.recipe.rl.arms[arm].reference,
                reference_digest=stage.record["inputs"].get("reference") if reference else None,
                expected_digest=run.digest_now(reference) if reference else None,
                vocabulary=vocabulary,
                unfinished=stage.path.name.endswith(".partial"),
            )
        )
    return found


def _proxy(run: RunFiles) -> Checkpoint | None:
    """The reward model, if the reward is one."""
    config = run.recipe.reward
    if config.stage is not None:
        return run.stages[config.stage].checkpoint if config.stage in run.stages else None
    return run.model(config.paths[0]) if config.paths else None


def _critic_init(run: RunFiles, arm: str, config: RLConfig) -> Checkpoint | None:
    """The model that the critic starts from: the reward model, if it has the policy's vocabulary; else None."""
    from salsa.models import same_vocabulary

    proxy, init = _proxy(run), run.model(run.recipe.rl.arms[arm].init)
    if proxy is None or init is None or config.algorithm != "ppo":
        return None
    if config.critic == "head" or config.lora is not None:
        return None
    return proxy if same_vocabulary(proxy.path, init.path) else None


def _episodes(run: RunFiles, sources: Sources, passes: bool) -> list[Episodes]:
    recipe = run.recipe
    stages = _rl_stages(run)
    if not any(read_trace(stage.path, 1) for *_, stage in stages):
        return []
    known = {p.ids: p for p in sources.prompts(recipe.rl.prompts)}
    found = []
    for arm, seed, config, stage in stages:
        rows = stage.metrics
        for update in sorted({1, len(rows)}):
            if trace := read_trace(stage.path, update):
                one = _traced(run, arm, seed, config, stage, update, trace, known)
                found.append(_replayed(run, one, config, known) if passes else one)
    return found


def _traced(
    run: RunFiles,
    arm: str,
    seed: int,
    config: RLConfig,
    stage: Stage,
    update: int,
    trace: Sequence[Row],
    known: Mapping[Ids, Prompt],
) -> Episodes:
    """The episodes of one update as they were recorded."""
    from salsa.models import load_tokenizer, sampling_for

    init = run.model(run.recipe.rl.arms[arm].init)
    assert init is not None  # it was trained from it
    tokenizer = load_tokenizer(init.path)
    ends = sampling_for(init.path, tokenizer, max_new_tokens=1, temperature=1.0).eos_ids
    prompts, replies = [tuple(r["prompt"]) for r in trace], [r["response"] for r in trace]
    decoded = tokenizer.batch_decode(replies, skip_special_tokens=True)
    names = (*PER_TOKEN, "sampler_logprobs")
    ragged: dict[str, Any] = {
        name: [np.array(r[name], dtype=float) for r in trace] for name in names
    }
    return Episodes(
        run=f"{arm} seed {seed}",
        arm=arm,
        update=update,
        config=config.model_dump(),
        precision=stage.record.get("precision", "fp32"),
        kl_coef=float(stage.metrics[update - 1]["kl_coef"]),
        prompts=prompts,
        responses=replies,
        texts=[text.strip() for text in decoded],
        eos_ids=ends,
        known_prompts=all(p in known for p in prompts),
        scores=np.array([r["score"] for r in trace]),
        **ragged,
    )


def _replayed(
    run: RunFiles, one: Episodes, config: RLConfig, known: Mapping[Ids, Prompt]
) -> Episodes:
    """What independent forward passes of the models on disk say of recorded episodes."""
    from salsa.doctor import replay

    def under(path: Path, temperature: float = config.temperature) -> list[np.ndarray]:
        model = replay.language_model(path)
        return replay.logprobs(model, one.prompts, one.responses, temperature)

    again: dict[str, Sequence[np.ndarray]] = {}
    rule, init = run.recipe.rl.arms[one.arm].rule, run.model(run.recipe.rl.arms[one.arm].init)
    models = [model for text in rule.models if (model := run.model(text)) is not None]
    if len(models) == len(rule.models) and (one.update == 1 or not rule.moves):
        parts = [under(model.path) for model in models]
        again["ref_logprobs"] = [
            sum(w * part for w, part in zip(rule.weights, row, strict=True))
            for row in zip(*parts, strict=True)
        ]
    if one.update == 1 and init is not None:
        again["logprobs"] = under(init.path)
    late = None
    if one.update == 1 and (critic := _critic_init(run, one.arm, config)) is not None:
        model = replay.classifier(critic.path)
        again["values"] = replay.values(model, one.prompts, one.responses)
        late = replay.values(model, one.prompts, one.responses, late=1)
    one = replace(one, again=again, late_values=late)
    one = _explained_logprobs(run, one, under)
    proxy = _proxy(run)
    if proxy is None or not one.known_prompts:
        return one
    return _scored(one, proxy.path, [known[tuple(p)] for p in one.prompts])


def _explained_logprobs(run: RunFiles, one: Episodes, under: Callable[..., Any]) -> Episodes:
    """With what else the recorded log-probabilities could be, where they are not what they should be."""
    limit = rollout_gates.limit_of(one.precision)
    off = lambda name, ours: name in one.again and rollout_gates.gap(ours, one.again[name]) > limit
    if off("logprobs", one.logprobs):
        init = run.model(run.recipe.rl.arms[one.arm].init)
        assert init is not None
        one = replace(one, other_temperatures={"1": under(init.path, 1.0)})
    if off("ref_logprobs", one.ref_logprobs):
        names = ["base", *(f"sft[{index}]" for index in range(run.recipe.sft.count))]
        there = {name: model for name in names if (model := run.model(name)) is not None}
        others = {name: under(model.path) for name, model in there.items()}
        one = replace(one, other_references=others)
    return one


def _scored(one: Episodes, proxy: Path, prompts: Sequence[Prompt]) -> Episodes:
    from salsa.doctor import replay

    asked = [(p.messages, p.text, text) for p, text in zip(prompts, one.texts, strict=True)]
    one = replace(one, scores_again=replay.scores(proxy, asked))
    if reward_gates.score_gap(one.unfined, one.scores_again, one.config) > reward_gates.SAME:
        last = [words(list(p.messages)[-1:]) if p.messages else p.text for p in prompts]
        turn = replay.scores(
            proxy, [(p.messages, p.text, t) for p, t in zip(prompts, last, strict=True)]
        )
        one = replace(one, other_scores={"the user's last turn in place of the reply": turn})
    return one


def _samples(run: RunFiles, sources: Sources, passes: bool) -> list[Samples]:
    from salsa.doctor import replay

    recipe, found = run.recipe, []
    for arm in ("sft", *recipe.rl.arms):
        stages = [run.stages.get(f"eval {arm} seed {seed}") for seed in recipe.rl.seeds]
        if any(stage is None for stage in stages):
            continue
        rows = [read_jsonl(stage.path / "samples.jsonl") for stage in stages if stage is not None]
        if not all(rows) or len({len(of_seed) for of_seed in rows}) > 1:
            continue
        names = [k for k, v in rows[0][0].items() if isinstance(v, int | float | bool)]
        columns = {
            n: np.array([[float(row[n]) for row in of_seed] for of_seed in rows]) for n in names
        }
        prompts, texts = [r["prompt"] for r in rows[0]], [r["response"] for r in rows[0]]
        found.append(Samples(arm, arm != "sft", prompts, columns, texts))
    proxy = _proxy(run)
    if not passes or not found or proxy is None:
        return found
    known: dict[str, Prompt] = {}
    for prompt in sources.prompts(recipe.eval.prompts):
        known.setdefault(prompt.text, prompt)
    scored = []
    for one in found:
        asked = [known.get(text) for text in one.prompts[: SAMPLE // 2]]
        rows_known = [(p.messages, p.text, t) for p, t in zip(asked, one.texts, strict=False) if p]
        if len(rows_known) == len(asked):
            one = replace(one, proxy_again=replay.scores(proxy.path, rows_known))
        scored.append(one)
    return scored

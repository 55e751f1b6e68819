"""From a run directory, or a recipe alone, to the evidence that the gates judge.

Forward passes are few: SAMPLE rows of each kind, through `salsa.doctor.replay`. torch is imported only for them.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from salsa.artifacts import Checkpoint, read_jsonl
from salsa.config import DataSource, Recipe, RLConfig
from salsa.config.expressions import parse_model, text_of
from salsa.data import (
    PREFERENCE_COLUMNS,
    SFT_COLUMNS,
    Prompt,
    Row,
    as_prompt,
    describe,
    load_prompts,
    load_rows,
    preference_rows,
    render,
    sft_rows,
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
    Source,
)
from salsa.doctor.files import RunFiles
from salsa.rewards import FunctionScorer
from salsa.runtime.tracking import quiet_libraries
from salsa.stages.directory import Stage, policy_label
from salsa.trace import PER_TOKEN, read_trace

SAMPLE = 64
"""Rows of a kind that are run through a model."""
READ = 5000
"""Rows of a data set that are looked at, the first ones."""
KNOWN_MARKS = (
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|endoftext|>",
)  # fmt: skip
"""Marks of common chat templates; no person writes them."""

Ids = tuple[int, ...]


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
    data = data_of(recipe, tokenizer, pairs)
    return Evidence(
        recipe.name, data, not_measured=("everything after the data: nothing is trained yet",)
    )


def after(run: RunFiles, *, largest: int | None = None) -> Evidence:
    """The evidence of a run, as far as it got; without forward passes where the base has more than `largest` bytes."""
    recipe, missing = run.recipe, []
    base = run.model("base")
    if base is None:
        return Evidence(recipe.name, not_measured=("everything: the base model is not there",))
    from salsa.doctor import replay
    from salsa.models import load_tokenizer

    quiet_libraries()
    replay.forget()
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
    data = data_of(recipe, tokenizer, pairs)
    samples = _samples(run, passes)
    sft = _sft(run, base, data, samples, passes)
    if sft is None:
        missing.append("SFT: no model is there")
    reward = _reward(run, data, pairs) if passes else None
    if reward is None and passes:
        missing.append("accuracy of the reward: no reward model was trained here")
    runs = _runs(run, len(tokenizer))
    episodes = _episodes(run, tokenizer, passes)
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
        recipe.name, data, sft, reward, episodes, runs, samples, recipe.eval.baseline, tuple(recipe.eval.scores),
        num_eval, missing,
    )  # fmt: skip


def data_of(recipe: Recipe, tokenizer: Any, pairs: Sequence[Row] | None) -> Data:
    """The data of every role; `pairs` are preference rows of `salsa.data`, where there are any."""
    contents: list[str] = []
    sources = []
    replies: list[str] = []
    tokens: list[int] = []
    reply_tokens: list[int] = []
    if recipe.sft.dataset is not None:
        rows = _sft_rows(recipe.sft.dataset, tokenizer)[:READ]
        sources.append(Source("sft", [words(row["prompt"]) for row in rows]))
        replies = [words(row["completion"]) for row in rows]
        shown = [_shown(row, tokenizer) for row in rows]
        tokens = [len(prompt) + len(reply) for prompt, reply in shown]
        reply_tokens = [len(reply) for _, reply in shown]
        contents += [text for row in rows for text in _contents(row["prompt"])] + replies
    asked = [("rl", recipe.rl.prompts), ("eval", recipe.eval.prompts)]
    preferences = recipe.preferences
    if preferences is not None and preferences.prompts is not None:
        asked.insert(0, ("preferences", preferences.prompts))
    for role, source in asked:
        prompts = load_prompts(source, tokenizer, max_tokens=None)[:READ]
        fit = [p for p in prompts if 0 < len(p.ids) <= recipe.rl.max_prompt_tokens]
        sources.append(Source(role, [p.text for p in fit], len(prompts) - len(fit)))
        contents += [
            text for p in fit for text in _contents(list(p.messages) if p.messages else p.text)
        ]
    found = None
    if pairs is not None:
        found = _pairs(recipe, pairs[:READ], tokenizer)
        if not any(source.role == "preferences" for source in sources):
            sources.insert(0, Source("preferences", found.prompts))
    marks = sorted({t for t in tokenizer.all_special_tokens if len(t) > 2} | set(KNOWN_MARKS))
    own = [mark for mark in marks if mark not in KNOWN_MARKS]
    in_use = own + [mark for mark in KNOWN_MARKS if any(mark in text for text in contents)]
    return Data(
        sources, replies, tokens, reply_tokens, recipe.sft.max_length, found, in_use, contents
    )  # fmt: skip


def words(value: Any) -> str:
    """A prompt or a reply as text: its messages' words, a line each."""
    return value if isinstance(value, str) else "\n".join(str(m["content"]) for m in value)


def _contents(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(m["content"]) for m in value]


def _sft_rows(source: DataSource, tokenizer: Any) -> list[Row]:
    return sft_rows(load_rows(source, SFT_COLUMNS), tokenizer, describe(source))


def _shown(row: Row, tokenizer: Any, rendering: str = "template") -> tuple[Ids, Ids]:
    """(prompt, reply with its end) in tokens, as the chat template, `twice` applied, or no template shows them."""
    prompt, reply = row["prompt"], words(row["completion"])
    encode = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = int(tokenizer.eos_token_id)
    if rendering == "bare" or not isinstance(prompt, list):
        bare = words(prompt)
        return tuple(tokenizer(bare)["input_ids"]) or (end,), (*encode(reply), end)
    if rendering == "twice":
        text = render(prompt, tokenizer, "sft", add_generation_prompt=True)
        prompt = [{"role": "user", "content": text}]
    return as_prompt({"prompt": prompt}, tokenizer).ids, (*encode(reply), end)


def _pairs(recipe: Recipe, rows: Sequence[Row], tokenizer: Any) -> Pairs:
    prompts = [words(row["prompt"]) for row in rows]
    chosen, rejected = ([words(row[side]) for row in rows] for side in ("chosen", "rejected"))
    lengths = []
    for row, a, b in zip(rows, chosen, rejected, strict=True):
        longer = a if len(a) > len(b) else b
        prompt, reply = _shown({"prompt": row["prompt"], "completion": longer}, tokenizer)
        lengths.append(len(prompt) + len(reply))
    longest = recipe.reward.max_length if recipe.reward.trains else 0
    found = Pairs(prompts, chosen, rejected, tokens=lengths, max_length=longest)
    config = recipe.preferences
    if config is None or config.labeller is None:
        return found
    asked = [_as_prompt(row["prompt"]) for row in rows]
    score = FunctionScorer([config.labeller])
    both = np.array([score(asked, chosen), score(asked, rejected)]).T
    return replace(found, scores=both, noise=config.noise)


def _as_prompt(value: Any) -> Prompt:
    """The prompt as reward functions see it, as `salsa.data.as_prompt` makes its text."""
    if isinstance(value, str):
        return Prompt((), None, value)
    turns = [f"{turn['role']}: {turn['content']}" for turn in value]
    return Prompt((), tuple(value), value[0]["content"] if len(value) == 1 else "\n".join(turns))


def _sft(
    run: RunFiles, base: Checkpoint, data: Data, samples: Sequence[Samples], passes: bool
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
    tokenizer = replay.tokenizer_of(base.path)
    rows = _likely_rows(recipe.sft.dataset, tokenizer)
    kinds = {name: [_shown(row, tokenizer) for row in own] for name, own in rows.items()}

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


def _likely_rows(source: DataSource, tokenizer: Any) -> dict[str, list[Row]]:
    """`seen`: rows that SFT trained on. `unseen`: rows of the same source that its limit left out."""
    seen = _sft_rows(source, tokenizer)
    rng = random.Random(0)
    kinds = {"seen": rng.sample(seen, min(SAMPLE, len(seen)))}
    if source.limit is not None:
        known = {(words(r["prompt"]), words(r["completion"])) for r in seen}
        rows = _sft_rows(source.model_copy(update={"limit": None}), tokenizer)
        unseen = [r for r in rows if (words(r["prompt"]), words(r["completion"])) not in known]
        if len(unseen) >= SAMPLE // 4:
            kinds["unseen"] = rng.sample(unseen, min(SAMPLE, len(unseen)))
    return kinds


def _renderings(rows: Sequence[Row], tokenizer: Any, model: Any) -> dict[str, np.ndarray]:
    from salsa.doctor import replay

    if not tokenizer.chat_template or not isinstance(rows[0]["prompt"], list):
        return {}
    found = {}
    for name in ("template", "twice", "bare"):
        prompts, replies = zip(*[_shown(row, tokenizer, name) for row in rows], strict=True)
        found[name] = replay.nll(replay.logprobs(model, prompts, replies))[0]
    return found


def _reward(run: RunFiles, data: Data, pairs: Sequence[Row] | None) -> Reward | None:
    from salsa.doctor import replay

    config, stage = run.recipe.reward, run.stages.get("reward")
    if stage is None or not config.trains or pairs is None:
        return None
    numbers = list(range(len(pairs)))
    random.Random(config.split_seed).shuffle(numbers)
    count = -int(-len(pairs) * config.holdout // 1) if config.holdout else 0
    held_out, seen = numbers[:count][: 4 * SAMPLE], numbers[count:][: 2 * SAMPLE]

    def scored(rows: Sequence[int]) -> np.ndarray:
        if not rows:
            return np.zeros((0, 2))
        sides = []
        for side in ("chosen", "rejected"):
            shown = [
                (_messages(pairs[i]["prompt"]), words(pairs[i]["prompt"]), words(pairs[i][side]))
                for i in rows
            ]
            sides.append(replay.scores(stage.path, shown))
        return np.stack(sides, axis=1)

    ceiling = None
    if data.pairs is not None and data.pairs.scores is not None and held_out:
        d = np.diff(data.pairs.scores[[i for i in held_out if i < len(data.pairs.scores)]], axis=1)
        ceiling = float((1 / (1 + np.exp(-np.abs(d) / data.pairs.noise))).mean())
    return Reward(scored(held_out), scored(seen), ceiling)


def _messages(prompt: Any) -> Any:
    return prompt if isinstance(prompt, list) else None


def _rl_stages(run: RunFiles) -> list[tuple[str, int, RLConfig, Stage]]:
    found = []
    for arm in run.recipe.rl.arms:
        config = run.recipe.rl.config_of(arm)
        for seed in run.recipe.rl.seeds:
            stage = run.stages.get(policy_label(arm, seed))
            if stage is not None and isinstance(config, RLConfig):
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
                policy_moved=replay.weights_differ(stage.path, init.path) if init else None,
                critic_moved=replay.weights_differ(critic, critic_init.path)
                if critic_init and critic.is_dir()
                else None,
                pulls=rule.pulls,
                named_reference=run.recipe.rl.arms[arm].reference,
                reference_digest=stage.record["inputs"].get("reference") if reference else None,
                expected_digest=run.digest_now(reference) if reference else None,
                vocabulary=vocabulary,
            )
        )
    return found


def _proxy(run: RunFiles) -> Checkpoint | None:
    """The reward model, if the reward is one."""
    config = run.recipe.reward
    if config.functions:
        return None
    for label in ("reward", "reward soup"):
        if label in run.stages:
            return run.stages[label].checkpoint
    return run.model(config.paths[0]) if len(config.paths) == 1 else None


def _critic_init(run: RunFiles, arm: str, config: RLConfig) -> Checkpoint | None:
    """The model that the critic starts from: the reward model, if it has the policy's vocabulary; else None."""
    from salsa.models import same_vocabulary

    proxy, init = _proxy(run), run.model(run.recipe.rl.arms[arm].init)
    if proxy is None or init is None or config.algorithm != "ppo":
        return None
    if config.critic == "head" or config.lora is not None:
        return None
    return proxy if same_vocabulary(proxy.path, init.path) else None


def _episodes(run: RunFiles, tokenizer: Any, passes: bool) -> list[Episodes]:
    recipe = run.recipe
    stages = _rl_stages(run)
    if not any(read_trace(stage.path, 1) for *_, stage in stages):
        return []
    known = {p.ids: p for p in load_prompts(recipe.rl.prompts, tokenizer, max_tokens=None)}
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
    return _scored(one, proxy.path, [known[tuple(p)] for p in one.prompts], config)


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


def _scored(one: Episodes, proxy: Path, prompts: Sequence[Prompt], config: RLConfig) -> Episodes:
    from salsa.doctor import replay

    fine = config.missing_eos_penalty * reward_gates.missing_eos(one)
    asked = [(p.messages, p.text, text) for p, text in zip(prompts, one.texts, strict=True)]
    again = replay.scores(proxy, asked)
    one = replace(one, scores_again=again - fine)
    if reward_gates.score_gap(one.scores, one.scores_again, one.config) > reward_gates.SAME:
        last = [words(list(p.messages)[-1:]) if p.messages else p.text for p in prompts]
        turn = replay.scores(
            proxy, [(p.messages, p.text, t) for p, t in zip(prompts, last, strict=True)]
        )
        one = replace(one, other_scores={"the user's last turn in place of the reply": turn - fine})
    return one


def _samples(run: RunFiles, passes: bool) -> list[Samples]:
    from salsa.doctor import replay
    from salsa.models import load_tokenizer

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
    proxy, base = _proxy(run), run.model("base")
    if not passes or not found or proxy is None or base is None:
        return found
    known: dict[str, Prompt] = {}
    for prompt in load_prompts(recipe.eval.prompts, load_tokenizer(base.path), max_tokens=None):
        known.setdefault(prompt.text, prompt)
    scored = []
    for one in found:
        asked = [known.get(text) for text in one.prompts[: SAMPLE // 2]]
        rows_known = [(p.messages, p.text, t) for p, t in zip(asked, one.texts, strict=False) if p]
        if len(rows_known) == len(asked):
            one = replace(one, proxy_again=replay.scores(proxy.path, rows_known))
        scored.append(one)
    return scored

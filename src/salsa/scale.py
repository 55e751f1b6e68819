"""`--scale tiny`: the same recipe with tiny random models and a few rows made here, to try the whole path in a minute.

Kept are the stages, the arms, the algorithm, the architecture (grouped heads, tied embeddings, sliding window), the
chat templates, and which models share a tokenizer. Changed are sizes, data and counts; every change is told. Torch is
imported when the models are made.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salsa.config import Recipe
from salsa.config.expressions import paths_in
from salsa.config.schema import differences, validated
from salsa.errors import ConfigError
from salsa.planner.shapes import Shape, shape_of, shape_or

TEMPLATES = Path(__file__).parent / "assets" / "templates"
_TEMPLATE_OF = {"llama": "llama-2", "mistral": "mistral", "gemma": "gemma"}
_SPECIAL = {
    "llama": ("<unk>", "<s>", "</s>"),
    "mistral": ("<unk>", "<s>", "</s>"),
    "gemma": ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
}
"""Family → the special tokens of its tokenizer, in their order; the other tokens are the 256 bytes."""
_TRAINER = {"epochs": 1, "batch_size": 4, "max_length": 256, "checkpoint_every": 2}
_AT_MOST: dict[str, dict[str, Any]] = {
    "sft": _TRAINER,
    "preferences": {},
    "reward": _TRAINER,
    "rl": {
        "num_updates": 2, "rollout_size": 8, "microbatch_tokens": 512, "max_new_tokens": 8,
        "max_prompt_tokens": 128, "monitor_kl_every": 1, "checkpoint_every": 1,
    },
    "eval": {"batch_size": 4},
    "forecast": {"num_samples": 32, "batch_prompts": 4},
    "landscape": {"num_samples": 2},
}  # fmt: skip
"""Settings of each section, lowered to these."""
_IF_SET = {
    "microbatch_size": 2,
    "minibatch_size": 4,
    "group_size": 4,
    "critic_warmup": 1,
    "lr_warmup": 1,
    "max_new_tokens": 8,
}
"""Lowered likewise, where a recipe sets them."""
_SUBJECTS = ("rain", "bread", "the sea", "a long walk", "old maps", "tea", "bridges", "winter")


def tiny(recipe: Recipe, directory: Path) -> tuple[Recipe, list[str]]:
    """The recipe made tiny, its models written to `directory/tiny`, and a line for each change.

    Raises:
        ConfigError: `directory` holds something else than a run, or a model's shape is not known.
    """
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "stages").is_dir():
        raise ConfigError(
            f"{directory}: holds files that are not a run's. Choose another directory with --out."
        )
    base, folder = shape_of(recipe.model.path), directory / "tiny"
    (directory / "stages").mkdir(parents=True, exist_ok=True)
    before, values = (recipe.model_dump(mode="json", exclude_unset=True) for _ in range(2))
    values["model"] |= {"path": _write(folder / "base", base, base, seed=0), "precision": "auto"}
    for key in ("revision", "gguf_file"):
        values["model"].pop(key, None)

    def written(name: str, given: str, seed: int, scores: bool = False) -> str:
        return _write(folder / name, shape_or(given, base), base, seed=seed, scores=scores)

    for number in range(len(recipe.sft.checkpoints)):
        path = _write(folder / f"sft-{number}", base, base, seed=number + 1)
        values["sft"]["checkpoints"][number] = path
    for number, given in enumerate(recipe.reward.paths):
        values["reward"]["paths"][number] = written(f"reward-{number}", given, number, scores=True)
    for number, (name, given) in enumerate(recipe.eval.reward_models.items()):
        path = written(f"score-{number}", given, 100 + number, scores=True)
        values["eval"]["reward_models"][name] = path
    named = sorted({path for _, model in recipe.expressions() for path in paths_in(model)})
    models = {path: written(f"model-{n}", path, 200 + n) for n, path in enumerate(named)}
    values = _renamed(values, models)
    for section, limits in _AT_MOST.items():
        if values.get(section) is not None:
            _lower(values[section], limits)
    for arm in values["rl"]["arms"].values():
        _lower(arm, {}, _AT_MOST["rl"] | _TRAINER)
    values["rl"]["seeds"] = list(recipe.rl.seeds[:1])
    _local_data(values)
    return validated(Recipe, values, Path("--scale tiny")), list(differences(before, values))


def conversations() -> list[dict[str, Any]]:
    """Rows with `messages`, as UltraChat's: two questions and replies each."""
    turns = [(f"Tell me about {s}.", f"{s.capitalize()} is good.") for s in _SUBJECTS]
    rows = []
    for (ask, reply), (more, other) in zip(turns, turns[1:] + turns[:1], strict=True):
        said = ("user", ask), ("assistant", reply), ("user", more), ("assistant", other)
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return rows


def preferences() -> list[dict[str, Any]]:
    """Rows with `chosen` and `rejected`, conversations that begin alike, as UltraFeedback's."""
    rows = []
    for subject in _SUBJECTS:
        ask = {"role": "user", "content": f"Is {subject} nice?"}
        replies = f"Yes, {subject} is nice.", "No."
        chosen, rejected = ([ask, {"role": "assistant", "content": text}] for text in replies)
        rows.append({"chosen": chosen, "rejected": rejected})
    return rows


def prompts() -> list[dict[str, Any]]:
    """Rows with `prompt`."""
    return [{"prompt": f"What is {subject}?"} for subject in _SUBJECTS]


def _lower(
    section: dict[str, Any], limits: dict[str, Any], if_set: dict[str, Any] | None = None
) -> None:
    """Cut to powers of two, so that sizes that divided each other still do."""
    for key, most in (_IF_SET | (if_set or {}) | limits).items():
        old = section.get(key)
        if isinstance(old, list):
            section[key] = [min(one, most) for one in old]
        elif isinstance(old, float):
            section[key] = min(old, most)
        elif old:
            section[key] = 1 << (min(old, most).bit_length() - 1)
        elif key in limits:
            section[key] = most


def _renamed(value: Any, models: Mapping[str, str]) -> Any:
    """`value` with other paths of models in all expressions in it."""
    if isinstance(value, dict):
        return {key: _renamed(one, models) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, models) for one in value]
    if isinstance(value, str):
        for old, new in models.items():
            alone = rf"(?<![^\s(,*]){re.escape(old)}(?![^\s),])"
            value = re.sub(alone, new.replace("\\", r"\\"), value)
    return value


def _local_data(values: dict[str, Any]) -> None:
    """Every data set becomes rows that are made here."""
    places = {
        "sft": {"dataset": conversations},
        "preferences": {"dataset": preferences, "prompts": prompts},
    }
    places |= {section: {"prompts": prompts} for section in ("rl", "eval", "forecast", "landscape")}
    places["landscape"]["validation"] = conversations
    for section, sources in places.items():
        for key, function in sources.items():
            if (values.get(section) or {}).get(key) is not None:
                values[section][key] = {"call": f"salsa.scale:{function.__name__}"}


def _write(folder: Path, shape: Shape, base: Shape, *, seed: int, scores: bool = False) -> str:
    """A model of the family with two layers of width 32 and random weights, unless it is there; its path.

    One that `scores` is a sequence classifier with its family's chat template. The tokenizer of a model with another
    vocabulary than the base's has a token for padding besides.
    """
    if folder.is_dir():
        return str(folder)
    import torch
    import transformers

    special = _SPECIAL[shape.family] + (("[PAD]",) if shape.vocabulary != base.vocabulary else ())
    tokenizer = _tokenizer(special, _template(shape) if scores else None)
    name = {"llama": "Llama", "mistral": "Mistral", "gemma": "Gemma"}[shape.family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=max(1, 4 * shape.kv_heads // shape.heads), head_dim=8,
        intermediate_size=32 * shape.intermediate // shape.hidden, max_position_embeddings=512,
        tie_word_embeddings=shape.tied, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    if scores:
        config.num_labels = 1
        model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    else:
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)
    return str(folder)


def _template(shape: Shape) -> str:
    return (TEMPLATES / f"{_TEMPLATE_OF[shape.family]}.jinja").read_text(encoding="utf-8")


def _tokenizer(special: tuple[str, ...], template: str | None) -> Any:
    """Byte-level, with a family's special tokens; without a padding token where the family has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    if "<bos>" in special:
        named |= {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    named = {name: token for name, token in named.items() if token in special}
    others = [token for token in special if token not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=others,
        chat_template=template,
        **named,
    )

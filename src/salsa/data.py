"""Rows in, prompts out; torch-free. Rows come from a hub data set, a local file or a callable, in TRL's formats:

    SFT          messages | prompt + completion
    preferences  prompt + chosen + rejected | chosen + rejected (conversations that share their beginning)
    prompts      prompt | messages (a last assistant turn is dropped)

Departs from TRL: a prompt that is a plain string becomes one user turn wherever the model has a chat template, so that
SFT, reward model and RL see the same thing; and every assistant turn of `messages` becomes a row of its own, so that
the loss is on replies only whatever the template marks.
"""

import gzip
import importlib
import json
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from salsa.artifacts import digest_of, parse_jsonl, sha256_file
from salsa.config import DataSource
from salsa.config.schema import LOCAL_DATA
from salsa.errors import ConfigError, DataError, SalsaError, accessing
from salsa.runtime.tracking import say
from salsa.untrusted import template_limits

SFT_COLUMNS = [("messages",), ("prompt", "completion")]
PREFERENCE_COLUMNS = [("chosen", "rejected")]

MAX_UNPACKED_BYTES = 1_000_000_000
"""Of a .gz file; more only up to a hundred times its size (text shrinks by 3 to 20)."""

_REPLIES = "Give `messages` in which an assistant answers, or rows of prompt + completion."

Row = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One prompt, in the three forms that are needed."""

    ids: tuple[int, ...]
    """What the policy sees, generation prompt included."""
    messages: tuple[Message, ...] | None
    """The conversation; None for bare text."""
    text: str
    """What reward functions and people see: the user's words, with roles if there are several turns."""


def import_callable(call: str) -> Callable[..., Any]:
    """Import `module:function`; the working directory is searched too.

    Raises:
        ConfigError: there is no such module or function.
    """
    module_name, _, function_name = call.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, PermissionError) as error:
        raise ConfigError(
            f"{call}: {module_name} cannot be imported ({error}). Install it, or run from its directory."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(
            f"{call}: {module_name} has no function {function_name!r}. Check the name after the colon."
        )
    return function


def describe(source: DataSource) -> str:
    """How messages name a source."""
    return source.call or str(source.path)


def fingerprint(source: DataSource) -> str:
    """Digest of a source: a file's bytes, a callable's module, a hub data set's name."""
    if source.call is not None:
        file = getattr(sys.modules[import_callable(source.call).__module__], "__file__", None)
        content = sha256_file(Path(file)) if file else source.call
    elif (path := Path(str(source.path))).is_file():
        with accessing(path, "read", DataError):
            content = sha256_file(path)
    else:
        content = str(source.path)
    return digest_of({"source": source.model_dump(exclude={"path"}), "content": content})


def load_rows(source: DataSource, columns: Sequence[Sequence[str]]) -> list[Row]:
    """Rows of a source, limited to a seeded sample as it says.

    Each row has one of the sets of `columns`, e.g. ``[("messages",), ("prompt", "completion")]``.

    Raises:
        DataError: nothing there, nothing in it, or none of the accepted columns.
    """
    where = describe(source)
    rows = _read(source)
    if not rows:
        raise DataError(f"{where}: no rows. Give a source with at least one.")
    for number, row in enumerate(rows, start=1):
        there = {c for c in row if row[c] is not None} if isinstance(row, dict) else set()
        if not any(there.issuperset(wanted) for wanted in columns):
            columns_here = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            wanted = " or ".join(map(" + ".join, columns))
            raise DataError(
                f"{where}: row {number} has columns {columns_here or 'none'}; wanted {wanted}. Rename them."
            )
    if source.limit is not None and source.limit < len(rows):
        rows = random.Random(source.shuffle_seed).sample(rows, source.limit)
    return rows


def load_prompts(source: DataSource, tokenizer: Any, *, max_tokens: int | None) -> list[Prompt]:
    """Prompts that fit `max_tokens`; all of them if it is None.

    Raises:
        DataError: as `load_rows`; or no prompt is short enough; or a conversation without a chat template.
    """
    rows = load_rows(source, [("prompt",), ("messages",)])
    prompts = [as_prompt(row, tokenizer, describe(source)) for row in rows]
    if max_tokens is None:
        return prompts
    fitting = [prompt for prompt in prompts if 0 < len(prompt.ids) <= max_tokens]
    if not fitting:
        raise DataError(
            f"{describe(source)}: none of {len(prompts)} prompts has at most {max_tokens} tokens. "
            "Raise rl.max_prompt_tokens."
        )
    if dropped := len(prompts) - len(fitting):
        say(
            f"{describe(source)}: {dropped} of {len(prompts)} prompts dropped, over {max_tokens} tokens"
        )
    return fitting


def as_prompt(row: Row, tokenizer: Any, where: str = "prompt") -> Prompt:
    """A row's prompt, tokenized through the chat template (bare text if the model has none)."""
    value: Any = row.get("prompt")
    whole = value is None
    if whole:
        value = row["messages"]
    messages = as_messages(value, tokenizer, where)
    if messages is None:
        return Prompt(tuple(tokenizer(value)["input_ids"]), None, value)
    if whole and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = render(messages, tokenizer, where, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    turns = [f"{turn['role']}: {turn['content']}" for turn in messages]
    plain = messages[0]["content"] if len(messages) == 1 else "\n".join(turns)
    return Prompt(tuple(ids), tuple(messages), plain)


def as_messages(value: Any, tokenizer: Any, where: str) -> list[Message] | None:
    """The conversation that a prompt stands for; None for bare text and a model without a chat template."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if tokenizer.chat_template else None
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: rows are conversations and the model has no chat template. "
            "Set model.chat_template to a Jinja file, or use plain prompt/completion strings."
        )
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value
    ):
        raise DataError(
            f"{where}: a conversation is a list of {{role, content}}, got {str(value)[:60]!r}."
        )
    return value


def render(
    messages: Sequence[Message], tokenizer: Any, where: str, *, add_generation_prompt: bool = False
) -> str:
    """Chat template applied; template errors become DataError."""
    try:
        with template_limits(where):
            return tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except SalsaError:
        raise
    except Exception as error:  # a template is a program, and may raise anything
        raise DataError(
            f"{where}: the model's chat template refuses a conversation: {error}"
        ) from error


def sft_rows(rows: Sequence[Row], tokenizer: Any, where: str, *, whole: bool = False) -> list[Row]:
    """Prompt/completion rows for TRL: one per assistant turn of `messages`; or `whole` conversations.

    Raises:
        DataError: rows of the wrong shape; or whole ones, and the chat template does not mark replies.
    """
    if whole:
        return _whole_conversations(rows, tokenizer, where)
    pairs: list[Row] = []
    for row in rows:
        if row.get("messages") is None:
            pairs.append(_pair(row["prompt"], row["completion"], tokenizer, where))
            continue
        messages = as_messages(row["messages"], tokenizer, where)
        for turn, message in enumerate(messages or []):
            if message["role"] == "assistant" and turn > 0:
                pairs.append({"prompt": row["messages"][:turn], "completion": [message]})
    if not pairs:
        raise DataError(f"{where}: no row has an assistant's reply to learn from. {_REPLIES}")
    _try_template([(pair["prompt"], pair["completion"]) for pair in pairs], tokenizer, where)
    return pairs


def _whole_conversations(rows: Sequence[Row], tokenizer: Any, where: str) -> list[Row]:
    if not _marks_replies(tokenizer):
        raise DataError(
            f"{where}: sft.assistant_only_loss needs a chat template that marks replies with {{% generation %}}, and "
            "the model's does not. Set model.chat_template to one that does, or leave assistant_only_loss out."
        )
    whole: list[Row] = []
    for row in rows:
        if row.get("messages") is None:
            pair = _pair(row["prompt"], row["completion"], tokenizer, where)
            whole.append({"messages": pair["prompt"] + pair["completion"]})
        else:
            whole.append({"messages": as_messages(row["messages"], tokenizer, where)})
    whole = [row for row in whole if any(m["role"] == "assistant" for m in row["messages"])]
    if not whole:
        raise DataError(f"{where}: no row has an assistant's reply to learn from. {_REPLIES}")
    _try_template([(None, row["messages"]) for row in whole], tokenizer, where)
    return whole


def _marks_replies(tokenizer: Any) -> bool:
    """Whether the chat template has {% generation %}, or TRL knows a version of it that has."""
    if not tokenizer.chat_template:
        return False
    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        return True
    from trl import get_training_chat_template

    try:
        return bool(get_training_chat_template(tokenizer))
    except ValueError:
        return False


def kept_back(
    prompts: Sequence[Any], share: float, seed: int, whole_prompts: bool
) -> tuple[list[int], list[int]]:
    """Numbers of the pairs that are kept back and of those that train, given each pair's prompt; both in drawn order.

    With `whole_prompts` all pairs of a prompt are on one side, and at least the share is kept back.
    """
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    count = math.ceil(len(prompts) * share)
    if not whole_prompts:
        return order[:count], order[count:]
    by_prompt: dict[str, list[int]] = {}
    for i in order:
        by_prompt.setdefault(repr(prompts[i]), []).append(i)
    back: list[int] = []
    for same in by_prompt.values():
        if len(back) < count:
            back += same
    kept = set(back)
    return back, [i for i in order if i not in kept]


def preference_rows(rows: Sequence[Row], tokenizer: Any, where: str) -> list[Row]:
    """Prompt/chosen/rejected rows for TRL, conversational wherever the model has a chat template.

    Two conversations are no pair where one of them adds nothing to what they share: dropped, and counted.

    Raises:
        DataError: rows of the wrong shape, none that is a pair, or the chat template refuses one.
    """
    result = []
    for row in rows:
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if prompt is None and isinstance(chosen, list):
            turns = zip(chosen, rejected, strict=False)
            shared = len(list(takewhile(lambda pair: pair[0] == pair[1], turns)))
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if prompt is None:
            raise DataError(
                f"{where}: rows without a prompt must be conversations. Split the prompt off into its own column."
            )
        pair, other = (_pair(prompt, reply, tokenizer, where) for reply in (chosen, rejected))
        chosen, rejected = pair["completion"], other["completion"]
        if chosen != [] and rejected != []:
            result.append({"prompt": pair["prompt"], "chosen": chosen, "rejected": rejected})
    if dropped := len(rows) - len(result):
        what = "chosen or rejected adds no reply to what they share"
        if not result:
            raise DataError(f"{where}: none of {dropped} rows is a pair: {what}. Give two replies.")
        say(f"{where}: {dropped} of {len(rows)} pairs dropped: {what}")
    sides = [(row["prompt"], row[side]) for row in result for side in ("chosen", "rejected")]
    _try_template(sides, tokenizer, where)
    return result


def _try_template(turns: Sequence[tuple[Any, Any]], tokenizer: Any, where: str) -> None:
    """Render one (prompt, reply) of each sequence of roles within bounds: TRL renders them all, and has none.

    Bare text is not rendered; a prompt of None belongs to a conversation that is rendered as a whole only.
    """
    seen: set[tuple[str, ...]] = set()
    for prompt, reply in turns:
        if isinstance(prompt, str):
            continue
        conversation = [*(prompt or []), *reply]
        roles = tuple(str(message.get("role")) for message in conversation)
        if roles not in seen:
            seen.add(roles)
            if prompt is not None:
                render(prompt, tokenizer, where, add_generation_prompt=True)
            render(conversation, tokenizer, where)


def draw_prompts(
    prompts: Sequence[Prompt], count: int, group_size: int, seed: int, update: int
) -> list[Prompt]:
    """The `count` prompts of an update, each `group_size` times in a row.

    Consecutive slices of one shuffled pass after another: they depend on seed and update only.
    """
    size, distinct = len(prompts), count // group_size
    first, last = update * distinct, (update + 1) * distinct
    drawn: list[Prompt] = []
    for epoch in range(first // size, -(-last // size)):
        order = random.Random(f"{seed}-{epoch}").sample(range(size), size)
        start = epoch * size
        drawn += [prompts[i] for i in order[max(first - start, 0) : last - start]]
    return [prompt for prompt in drawn for _ in range(group_size)]


def _pair(prompt: Any, completion: Any, tokenizer: Any, where: str) -> Row:
    """Prompt and completion in one kind: both conversations, or both bare text."""
    messages = as_messages(prompt, tokenizer, where)
    if messages is None:
        if not isinstance(completion, str):
            raise DataError(
                f"{where}: the prompt is a string and the reply is not. Make both strings."
            )
        return {"prompt": prompt, "completion": completion}
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    turns = as_messages(completion, tokenizer, where) or []
    spoken, asked = ([(m["role"], m["content"]) for m in part] for part in (turns, messages))
    if len(turns) > len(messages) and spoken[: len(asked)] == asked:
        turns = turns[len(messages) :]  # the whole conversation, as in UltraFeedback's rows
    return {"prompt": messages, "completion": turns}


def _read(source: DataSource) -> list[Row]:
    if source.call is not None:
        return list(import_callable(source.call)())
    path = Path(str(source.path))
    if path.is_file():
        return _read_file(path)
    if path.exists():
        raise DataError(f"{path}: is a directory. Give a {', '.join(LOCAL_DATA)} file in it.")
    if path.name.endswith(LOCAL_DATA) or path.is_absolute() or str(path).startswith("."):
        raise DataError(f"{path}: no such file. Check the path (it is relative to {Path.cwd()}).")
    import datasets

    try:
        return datasets.load_dataset(source.path, source.name, split=source.split).to_list()
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source.path}: neither a file here nor a data set that the hub gives out ({reason})."
        ) from error


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read as parquet ({error}). Copy or save it again."
            ) from error
    if not path.name.endswith(LOCAL_DATA):
        raise DataError(f"{path}: unknown kind of file. Use one of {', '.join(LOCAL_DATA)}.")
    try:
        text = _unpacked(path) if path.suffix == ".gz" else path.read_text(encoding="utf-8")
        rows = None if ".jsonl" in path.name else json.loads(text)
    except (ValueError, OSError, EOFError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    if ".jsonl" in path.name:
        return [row for _, row in parse_jsonl(text.split("\n"), str(path))]
    if not isinstance(rows, list):
        kind = "an object" if isinstance(rows, dict) else repr(rows)[:40]
        raise DataError(
            f"{path}: holds {kind}, not a list of rows. Put the rows into [ ], or one a line into a .jsonl file."
        )
    return rows


def _unpacked(path: Path) -> str:
    """The text of a .gz file; ValueError if there is no end to it."""
    most = max(MAX_UNPACKED_BYTES, 100 * path.stat().st_size)
    pieces: list[bytes] = []
    size = 0
    with gzip.open(path, "rb") as file:
        while piece := file.read(1 << 20):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise ValueError(f"unpacks to more than {most} bytes")
    return b"".join(pieces).decode("utf-8")

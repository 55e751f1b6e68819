"""Talk to models: replies token by token, several models side by side, several samples of each."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from salsa.artifacts import resolve
from salsa.data import Message, as_prompt
from salsa.errors import ConfigError, DataError
from salsa.models import load_policy, load_tokenizer, sampling_for
from salsa.run import Run, is_run
from salsa.runtime.engine import Engine
from salsa.runtime.tracking import quiet_libraries, say

HINT = "Enter sends, /new forgets the conversation, /quit or Ctrl-D ends."
_UNFINISHED = "\ufffd"
"""What stands for the bytes of a character whose next token is still to come."""


class Speaker:
    """A model that replies to conversations."""

    def __init__(self, path: Path) -> None:
        """Load the model at `path` in fp32; CheckpointError if that is not possible."""
        self.path, self.device = path, Engine.create("fp32").device
        self.tokenizer = load_tokenizer(path)
        self.model: Any = torch.nn.Module.to(load_policy(path), self.device)
        self.context = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize

    @torch.no_grad()
    def stream(
        self,
        conversation: Sequence[Message],
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int = 0,
    ) -> Iterator[str]:
        """The reply so far, after each token; at least once. A temperature of 0 takes the likeliest token.

        A model without a chat template goes on from the last message as bare text.

        Raises:
            DataError: the conversation fills the model's context.
        """
        chats = self.tokenizer.chat_template
        asked = list(conversation) if chats else conversation[-1]["content"]
        ids = as_prompt({"prompt": asked}, self.tokenizer, "chat").ids
        room = min(max_new_tokens, self.context - len(ids))
        if room < 1:
            raise DataError(
                f"{self.path}: a conversation of {len(ids)} tokens fills the model's {self.context} positions. "
                "Begin a new one."
            )
        ends = sampling_for(self.path, self.tokenizer, max_new_tokens=room, temperature=1.0).eos_ids
        generator = torch.Generator(self.device).manual_seed(seed)
        step, cache, reply = torch.tensor([ids], device=self.device), None, []
        yield ""
        for _ in range(room):
            output = self.model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1].float()
            if temperature == 0:
                token = logits.argmax()
            else:
                weights = (logits / temperature).softmax(dim=-1)
                token = torch.multinomial(weights, 1, generator=generator)[0]
            if int(token) in ends:
                return
            reply.append(int(token))
            text = str(self.tokenizer.decode(reply, skip_special_tokens=True)).lstrip()
            yield text.rstrip(_UNFINISHED)
            step = token.reshape(1, 1)


def chat(
    what: str,
    *,
    arms: Sequence[str] = (),
    seed: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    system: str | None = None,
) -> None:
    """`salsa chat`: with the model `what`, or with arms of the run directory `what`.

    Without `arms`, a run's baseline and the arm after it. `seed` is the first RL seed if not given. Temperature and
    length are the run's, or 0.7 and 256 for a model.

    Raises:
        ConfigError: an arm or a seed that the run does not have, or one for what is no run.
        CheckpointError: there is no such model, or it is not trained yet.
    """
    quiet_libraries()
    if sys.stdin.isatty():
        say("loading …")
    if not is_run(Path(what)):
        if arms or seed is not None:
            raise ConfigError(
                f"{what}: is no run directory, which --arm and --seed choose from. Leave them out, or "
                "name a run."
            )
        speakers = {what: Speaker(resolve(what))}
        default = 0.7, 256
    else:
        run = Run(what)
        rl, baseline = run.recipe.rl, run.recipe.eval.baseline
        names = arms or [baseline, *(arm for arm in run.arms if arm != baseline)][:2]
        seed = run.seeds[0] if seed is None else seed
        speakers = {name: run.speaker(name, seed) for name in names}
        default = rl.temperature, rl.max_new_tokens
    talk(
        speakers,
        samples=samples,
        temperature=default[0] if temperature is None else temperature,
        max_new_tokens=max_new_tokens or default[1],
        system=system,
    )


def talk(
    speakers: Mapping[str, Speaker],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    system: str | None = None,
    source: TextIO | None = None,
) -> None:
    """Read messages, a line each, from `source` (standard input), and reply until it ends.

    Every speaker has its own conversation. With several samples a message stands alone: which of them would it go on
    from?
    """
    source, console = source or sys.stdin, Console(highlight=False, soft_wrap=True)
    asks = source.isatty() and console.is_terminal
    if asks:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - input() then has arrow keys and a history
        console.print(f"{', '.join(speakers)}. {HINT}", style="dim", markup=False)
    start = [{"role": "system", "content": system}] if system else []
    talks: dict[str, list[Message]] = {name: list(start) for name in speakers}
    for number in count():
        if (message := _message(source, console, asks)) is None:
            return
        if message == "/new":
            talks = {name: list(start) for name in speakers}
            continue
        turn = {"role": "user", "content": message}
        streams = {
            (name, sample): speaker.stream(
                [*talks[name], turn], temperature=temperature, max_new_tokens=max_new_tokens,
                seed=number * samples + sample,
            )
            for name, speaker in speakers.items()
            for sample in range(samples)
        }  # fmt: skip
        replies = show(streams, list(speakers), samples, console)
        if samples == 1:
            for name, own in talks.items():
                own += [turn, {"role": "assistant", "content": replies[name, 0]}]


def _message(source: TextIO, console: Console, asks: bool) -> str | None:
    """The next message that is not empty; None at the end."""
    while True:
        if asks:
            try:
                line = input("\n> ")
            except EOFError:
                console.print()
                return None
        elif not (line := source.readline()):
            return None
        if (line := line.strip()) == "/quit":
            return None
        if line:
            return line


def show(
    streams: Mapping[tuple[str, int], Iterator[str]],
    names: Sequence[str],
    samples: int,
    console: Console,
) -> dict[tuple[str, int], str]:
    """Show (name, sample) → reply while they come, a token of each in turn; the whole replies."""
    texts = dict.fromkeys(streams, "")
    alone = len(streams) == 1
    if not console.is_terminal or alone:
        for key, stream in streams.items():
            if not alone:
                number = f" {key[1] + 1}" if samples > 1 else ""
                console.print(f"{key[0]}{number}: ", end="", markup=False)
            for text in stream:
                console.print(text[len(texts[key]) :], end="", markup=False)
                texts[key] = text
            console.print()
        return texts
    with Live(_table(texts, names, samples), console=console, vertical_overflow="visible") as live:
        for step in zip_longest(*streams.values()):  # None where a reply has ended
            texts |= {key: text for key, text in zip(streams, step, strict=True) if text}
            live.update(_table(texts, names, samples))
    return texts


def _table(texts: Mapping[tuple[str, int], str], names: Sequence[str], samples: int) -> Table:
    """A column a model, a row a sample."""
    table = Table(show_lines=samples > 1, expand=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    for sample in range(samples):
        table.add_row(*(Text(texts[name, sample]) for name in names))
    return table

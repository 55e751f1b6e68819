"""The words of a recipe for models and anchors. Torch-free.

model    base | sft[i] | soup | soup[i,j,…] | a path with a /
         shrink(model, base, a)           base + a·(model − base)
         shrink(model, base, other)       as far from base as `other` is: a = ‖other − base‖ / ‖model − base‖
anchor   model                            stands still
         mixture(a*model, b*model, …)     several at once: Σ a_i·KL(π ‖ π_i); equal weights where none are given
         ema(model, μ)                    starts there and follows the policy: θ ← (1−μ)·θ + μ·θ_policy
         reset(model, n[, optimizer])     starts there and becomes the policy every n updates
         none                             pulls towards nothing
"""

import math
import re
from dataclasses import dataclass
from typing import Generic, TypeVar

_SIMPLE = re.compile(r"base|sft\[(\d+)\]|soup|soup\[(\d+(?:\s*,\s*\d+)*)\]")
_CALL = re.compile(r"(\w+)\((.*)\)")
_WEIGHTED = re.compile(r"([\d.eE+-]+)\s*\*\s*(.+)")
_MODELS = "sft[0], soup, soup[0,1], shrink(sft[0], base, 0.7), base, or a path that contains a /"
_ANCHORS = "mixture(sft[0], sft[1]), ema(sft[0], 0.01), reset(sft[0], 10) or none"

Model = TypeVar("Model")


@dataclass(frozen=True)
class Anchor(Generic[Model]):
    """What the KL pulls towards: expressions in a recipe, checkpoints in a run."""

    models: tuple[Model, ...]
    """One, or several for a mixture."""
    weights: tuple[float, ...] = (1.0,)
    """Of the mixture; they sum to 1."""
    ema: float | None = None
    """μ: the anchor follows the policy by this share at every optimizer step."""
    reset_every: int | None = None
    """The anchor becomes the policy after every so many updates."""
    reset_optimizer: bool = False
    """Whether a reset forgets the optimizers' moments too."""
    pulls: bool = True
    """False for `none`: the KL to `models` is logged, and not penalised."""

    @property
    def moves(self) -> bool:
        """Whether it changes during the run."""
        return self.ema is not None or self.reset_every is not None


def parse_anchor(text: str, init: str) -> Anchor[str]:
    """An arm's `reference:`; `none` measures its KL to `init`, where the policy starts.

    Raises:
        ValueError: it is no anchor, or names no model; the message says what may be written.
    """
    if text.strip() == "none":
        return Anchor((init,), pulls=False)
    name, arguments = _call(text)
    if name == "mixture":
        return _mixture(text, arguments)
    if name == "ema" and len(arguments) == 2:
        share = _number(arguments[1])
        if not 0 < share < 1:
            raise ValueError(f"{text!r}: μ must lie between 0 and 1, e.g. ema(sft[0], 0.01)")
        return Anchor((check_model(arguments[0]),), ema=share)
    if name == "reset" and len(arguments) in (2, 3) and arguments[2:] in ([], ["optimizer"]):
        if not arguments[1].isdigit() or int(arguments[1]) < 1:
            raise ValueError(
                f"{text!r}: the period is a number of updates, 1 or more, e.g. reset(sft[0], 10)"
            )
        return Anchor(
            (check_model(arguments[0]),),
            reset_every=int(arguments[1]),
            reset_optimizer=len(arguments) == 3,
        )
    try:
        return Anchor((check_model(text),))
    except ValueError as error:
        raise ValueError(f"{error}; an anchor may also be {_ANCHORS}") from None


def check_model(text: str) -> str:
    """Return `text` if it names a model.

    Raises:
        ValueError: it does not; the message says what may be written.
    """
    name, arguments = _call(text)
    if name == "shrink" and len(arguments) == 3 and arguments[1] == "base":
        check_model(arguments[0])
        share = _number(arguments[2])
        if math.isnan(share):
            check_model(arguments[2])
        elif not 0 <= share <= 1:
            raise ValueError(f"{text!r}: the share of the way from base lies between 0 and 1")
        return text
    if _SIMPLE.fullmatch(text) or ("/" in text and name is None):
        return text
    raise ValueError(f"{text!r} names no model. Use {_MODELS}")


def shrunk(model: str) -> tuple[str, float | str] | None:
    """(model, share or other model) of a `shrink(…)`; None for any other expression."""
    name, arguments = _call(model)
    if name != "shrink":
        return None
    share = _number(arguments[2])
    return arguments[0], arguments[2] if math.isnan(share) else share


def ingredients_of(model: str, soup: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the SFT models that a model expression is made of; empty for `base` and paths.

    Args:
        model: the expression.
        soup: ingredients of the recipe's `soup`.
    """
    if (inner := shrunk(model)) is not None:
        of_both = [ingredients_of(part, soup) for part in inner if isinstance(part, str)]
        return tuple(dict.fromkeys(index for part in of_both for index in part))
    match = _SIMPLE.fullmatch(model)
    if match is None or model == "base":
        return ()
    if model == "soup":
        return soup
    return tuple(int(index) for index in (match[1] or match[2]).split(","))


def _mixture(text: str, arguments: list[str]) -> Anchor[str]:
    matches = [_WEIGHTED.fullmatch(argument) for argument in arguments]
    if len(arguments) < 2 or len({match is None for match in matches}) > 1:
        raise ValueError(
            f"{text!r}: a mixture has two models or more, all with a weight or none, "
            "e.g. mixture(0.7*sft[0], 0.3*sft[1])"
        )
    models = [m[2] if m else a for m, a in zip(matches, arguments, strict=True)]
    weights = [_number(m[1]) if m else 1 / len(arguments) for m in matches]
    if not all(weight > 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"{text!r}: weights must be above 0 and sum to 1, not {sum(weights):g}")
    return Anchor(tuple(check_model(model) for model in models), tuple(weights))


def _call(text: str) -> tuple[str | None, list[str]]:
    """`name(a, b)` → name and arguments, split at the commas outside inner brackets; else (None, [])."""
    match = _CALL.fullmatch(text.strip())
    if match is None:
        return None, []
    arguments, depth = [""], 0
    for character in match[2]:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return match[1], [argument.strip() for argument in arguments]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

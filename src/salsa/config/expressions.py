"""The words of a recipe for models and references. Torch-free.

model      base | sft[i] | soup | soup[i,j,…] | a path with a /
           soup(a*model, b*model, …)        weighted; the weights sum to 1; equal where none are given
           shrink(model, base, a)           base + a·(model − base)
           shrink(model, base, other)       as far from base as `other` is: a = ‖other − base‖ / ‖model − base‖
reference  model                            stands still
           mixture(a*model, b*model, …)     several at once: Σ a_i·KL(π ‖ π_i); equal weights where none are given
           ema(model, μ)                    starts there and follows the policy: θ ← (1−μ)·θ + μ·θ_policy
           reset(model, n[, optimizer])     starts there and becomes the policy every n updates
           none                             pulls towards nothing
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_SFT = re.compile(r"sft\[(\d+)\]")
_SOUP = re.compile(r"soup\[(\d+(?:\s*,\s*\d+)*)\]")
_CALL = re.compile(r"(\w+)\((.*)\)")
_WEIGHTED = re.compile(r"([\d.eE+-]+)\s*\*\s*(.+)")
_LONGEST, _DEEPEST = 5000, 30
_MODELS = (
    "sft[0], soup, soup[0,1], shrink(sft[0], base, 0.7), soup(0.75*sft[0], 0.25*sft[1]), base, "
    "or a path that contains a /"
)
_REFERENCES = "mixture(sft[0], sft[1]), ema(sft[0], 0.01), reset(sft[0], 10) or none"

M = TypeVar("M")


@dataclass(frozen=True)
class Base:
    """`base`: the model that SFT starts from."""


@dataclass(frozen=True)
class SFT:
    """`sft[i]`"""

    index: int


@dataclass(frozen=True)
class RecipeSoup:
    """`soup`: what the recipe's `soup:` section says."""


@dataclass(frozen=True)
class Soup:
    """`soup[i,j]` or `soup(a*model, …)`: a weight average."""

    parts: tuple["Model", ...]
    weights: tuple[float, ...] | None = None
    """They sum to 1; uniform if None."""


@dataclass(frozen=True)
class Shrunk:
    """`shrink(model, base, …)`: a point between the base and a model."""

    model: "Model"
    share: "float | Model"
    """How far from the base; of a model, as far as that model is."""


@dataclass(frozen=True)
class Given:
    """A directory or hub name."""

    path: str


Model = Base | SFT | RecipeSoup | Soup | Shrunk | Given


@dataclass(frozen=True)
class ReferenceRule(Generic[M]):
    """What the KL pulls towards: model expressions in a recipe, checkpoints in a run."""

    models: tuple[M, ...]
    """One, or several for a mixture."""
    weights: tuple[float, ...] = (1.0,)
    """Of the mixture; they sum to 1."""
    ema: float | None = None
    """μ: the reference follows the policy by this share at every optimizer step."""
    reset_every: int | None = None
    """The reference becomes the policy after every so many updates."""
    reset_optimizer: bool = False
    """Whether a reset drops the optimizers' moments too."""
    pulls: bool = True
    """False for `none`: the KL to `models` is logged, and not penalised."""

    @property
    def moves(self) -> bool:
        """Whether it changes during the run."""
        return self.ema is not None or self.reset_every is not None


def identity_of(reference: ReferenceRule[Any]) -> str:
    """A reference of checkpoints in one line: its rule and their digests. One that stands still is its digest alone."""
    digests = [checkpoint.digest for checkpoint in reference.models]
    if reference == ReferenceRule(reference.models):
        return digests[0]
    rule = {key: value for key, value in vars(reference).items() if key != "models"}
    return f"{rule} of {digests}"


def parse_model(text: str) -> Model:
    """A model expression; ValueError, which says what may be written, for what names no model."""
    text = text.strip()
    _check_size(text)
    if text in ("base", "soup"):
        return Base() if text == "base" else RecipeSoup()
    if match := _SFT.fullmatch(text):
        return SFT(int(match[1]))
    name, arguments = _call(text)
    if match := _SOUP.fullmatch(text):
        return _soup(text, tuple(SFT(int(index)) for index in match[1].split(",")), None)
    if name == "soup":
        return _soup(text, *_weighted(text, arguments, "a soup"))
    if name == "shrink" and len(arguments) == 3 and arguments[1] == "base":
        share = _number(arguments[2])
        if math.isnan(share):
            return Shrunk(parse_model(arguments[0]), parse_model(arguments[2]))
        if not 0 <= share <= 1:
            raise ValueError(f"{text!r}: the share of the way from base lies between 0 and 1")
        return Shrunk(parse_model(arguments[0]), share)
    if "/" in text and name is None:
        return Given(text)
    raise ValueError(f"{text!r} names no model. Use {_MODELS}")


def parse_reference(text: str, init: str) -> ReferenceRule[Model]:
    """An arm's `reference:`; `none` measures its KL to `init`, where the policy starts.

    Raises:
        ValueError: it is no reference, or names no model; the message says what may be written.
    """
    if text.strip() == "none":
        return ReferenceRule((parse_model(init),), pulls=False)
    _check_size(text)
    name, arguments = _call(text)
    if name == "mixture":
        parts, weights = _weighted(text, arguments, "a mixture")
        return ReferenceRule(parts, weights or (1 / len(parts),) * len(parts))
    if name == "ema" and len(arguments) == 2:
        share = _number(arguments[1])
        if not 0 < share < 1:
            raise ValueError(f"{text!r}: μ must lie between 0 and 1, e.g. ema(sft[0], 0.01)")
        return ReferenceRule((parse_model(arguments[0]),), ema=share)
    if name == "reset" and len(arguments) in (2, 3) and arguments[2:] in ([], ["optimizer"]):
        if not arguments[1].isdigit() or int(arguments[1]) < 1:
            raise ValueError(
                f"{text!r}: the period is a number of updates, 1 or more, e.g. reset(sft[0], 10)"
            )
        return ReferenceRule(
            (parse_model(arguments[0]),),
            reset_every=int(arguments[1]),
            reset_optimizer=len(arguments) == 3,
        )
    try:
        return ReferenceRule((parse_model(text),))
    except ValueError as error:
        raise ValueError(f"{error}; a reference may also be {_REFERENCES}") from None


def text_of(model: Model) -> str:
    """The expression in its plainest spelling; equal models have equal texts, and different ones different texts."""
    match model:
        case Base():
            return "base"
        case RecipeSoup():
            return "soup"
        case SFT(index):
            return f"sft[{index}]"
        case Given(path):
            return path
        case Shrunk(of, share):
            far = _digits(share) if isinstance(share, float) else text_of(share)
            return f"shrink({text_of(of)}, base, {far})"
        case Soup(parts, None) if all(isinstance(part, SFT) for part in parts):
            return f"soup[{','.join(str(part.index) for part in parts if isinstance(part, SFT))}]"
        case Soup(parts, None):
            return f"soup({', '.join(map(text_of, parts))})"
        case Soup(parts, weights):
            terms = (f"{w!r}*{text_of(p)}" for w, p in zip(weights or (), parts, strict=True))
            return f"soup({', '.join(terms)})"


def sft_indices(model: Model, recipe_soup: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the SFT models that a model is made of, `soup` of `recipe_soup`; none for `base` and paths."""
    match model:
        case SFT(index):
            return (index,)
        case RecipeSoup():
            return recipe_soup
    return tuple(dict.fromkeys(i for m in _made_of(model) for i in sft_indices(m, recipe_soup)))


def paths_in(model: Model) -> tuple[str, ...]:
    """The directories and hub names that a model is made of."""
    if isinstance(model, Given):
        return (model.path,)
    return tuple(dict.fromkeys(path for part in _made_of(model) for path in paths_in(part)))


def _made_of(model: Model) -> tuple[Model, ...]:
    """The models that an expression combines; none for one that stands for itself."""
    match model:
        case Soup(parts, _):
            return parts
        case Shrunk(of, share):
            return (of,) if isinstance(share, float) else (of, share)
    return ()


def _soup(text: str, parts: tuple[Model, ...], weights: tuple[float, ...] | None) -> Soup:
    if len(set(parts)) < len(parts):
        raise ValueError(f"{text!r}: a model twice. Name each once")
    return Soup(parts, weights)


def _weighted(
    text: str, arguments: list[str], what: str
) -> tuple[tuple[Model, ...], tuple[float, ...] | None]:
    """`a*model, b*model` or `model, model` → models and weights; all have a weight, or none."""
    matches = [_WEIGHTED.fullmatch(argument) for argument in arguments]
    if len(arguments) < 2 or len({match is None for match in matches}) > 1:
        raise ValueError(
            f"{text!r}: {what} has two models or more, all with a weight or none, "
            "e.g. 0.7*sft[0], 0.3*sft[1]"
        )
    parts = tuple(parse_model(m[2] if m else a) for m, a in zip(matches, arguments, strict=True))
    if matches[0] is None:
        return parts, None
    weights = tuple(_number(match[1]) for match in matches if match)
    mixture = what == "a mixture"
    fits = all(w > 0 if mixture else w >= 0 for w in weights) and abs(sum(weights) - 1) <= 1e-6
    if not fits:
        least = "above 0" if mixture else "0 or more"
        raise ValueError(f"{text!r}: weights must be {least} and sum to 1, not {sum(weights):g}")
    return parts, weights


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


def _check_size(text: str) -> None:
    if len(text) > _LONGEST or text.count("(") > _DEEPEST:
        raise ValueError(
            f"{text[:40]!r}…: more than {_LONGEST} characters or {_DEEPEST} brackets. Make it in steps: salsa soup"
        )


def _digits(number: float) -> str:
    """The number with as many digits as it needs; 1, not 1.0."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

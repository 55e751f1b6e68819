"""What the sections of a recipe are written with: number types, markers, data sources, callables. Torch-free."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from salsa.config.expressions import parse_model
from salsa.errors import ConfigError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seeds = Annotated[tuple[int, ...], Field(min_length=1)]

WORD, MAPPING = "a word", "a mapping"
"""Tags of a value that may be either."""
LOCAL_DATA = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
"""Endings of the data files that are read here."""
_CALL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

T = TypeVar("T")
S = TypeVar("S", bound=BaseModel)
Execution = Annotated[T, "execution"]
"""A field that says how something is computed and does not decide the result."""
Added = Annotated[T, "added"]
"""A field of a later version: its default means what the stage did before, and is no part of the identity."""
Input = Annotated[T, "input"]
"""A field whose content enters a stage's identity as the digest of an input, a seed or another stage."""


class Strict(BaseModel):
    """Frozen and closed to unknown keys.

    Text that is a number counts as that number: YAML reads 1e-6, which has no point, as text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """The fields that decide a result, as JSON values: neither `Execution` nor `Input`."""
        fields = type(self).model_fields
        added = {n for n in self._marked("added") if getattr(self, n) == fields[n].default}
        return self.model_dump(mode="json", exclude=self._marked("execution", "input") | added)

    def execution(self) -> dict[str, Any]:
        """The `Execution` fields, as JSON values."""
        return self.model_dump(mode="json", include=self._marked("execution"))

    def decisive(self) -> dict[str, Any]:
        """Everything but the `Execution` fields, at any depth, as JSON values."""
        values = self.model_dump(mode="json", exclude=self._marked("execution"))
        return {name: _decisive(getattr(self, name), value) for name, value in values.items()}

    def check_unset(self, names: Sequence[str], why: str) -> None:
        """ValueError for a field that was set and, as `why` says, changes nothing."""
        for name in names:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} changes nothing {why}. Remove it")

    def check_divides(self, part: str, whole: str) -> None:
        """ValueError, with the divisors to choose from, if a `part` that is set does not divide `whole`."""
        size, total = getattr(self, part), getattr(self, whole)
        if size is not None and total % size:
            *others, last = (str(d) for d in range(1, total + 1) if total % d == 0)
            choice = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{part}={size} does not divide {whole}={total}. Use {choice}.")

    def _marked(self, *markers: str) -> set[str]:
        """Names of the fields that carry one of the markers."""
        fields = type(self).model_fields.items()
        return {name for name, field in fields if set(markers) & set(map(str, field.metadata))}


def _decisive(value: Any, dumped: Any) -> Any:
    """`dumped`, the JSON of `value`, without what is `Execution` in the sections within."""
    match value:
        case Strict():
            return value.decisive()
        case dict():
            return {key: _decisive(one, dumped[key]) for key, one in value.items()}
        case tuple():
            return [_decisive(one, json) for one, json in zip(value, dumped, strict=True)]
    return dumped


def check_call(value: str) -> str:
    """Return `value` if it reads `module:function`; ValueError if not."""
    if not _CALL.fullmatch(value):
        raise ValueError(f"{value!r} is not module:function, e.g. my_rewards:score")
    return value


def _check_models(values: tuple[str, ...]) -> tuple[str, ...]:
    for text in values:
        parse_model(text)
    if len(set(values)) < len(values):
        raise ValueError("names a model twice. Name each once")
    return values


ModelText = Annotated[str, AfterValidator(lambda text: _check_models((text,))[0])]
"""A model expression, as text."""
Models = AfterValidator(_check_models)
"""Marks a tuple of different model expressions; after the bounds of its length."""


class DataSource(Strict):
    """Where rows come from. A bare string is short for `path`."""

    path: str | None = None
    """A .jsonl, .json or .parquet file (or .gz of the first two), or a hub data set's name."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    call: str | None = None
    """`module:function` returning a list of rows, instead of `path`."""
    limit: Count | None = None
    """Keep the first `limit` rows after the seeded shuffle."""
    shuffle_seed: int = 0
    """Seed of the shuffle that precedes `limit`."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.call is None):
            raise ValueError("give exactly one of path and call")
        if self.call is not None:
            check_call(self.call)
        if self.call is not None or str(self.path).endswith(LOCAL_DATA):
            self.check_unset(("name", "split"), "where rows do not come from a hub data set")
        if self.limit is None:
            self.check_unset(("shuffle_seed",), "without limit: all rows are kept as they come")
        return self


class RewardFunction(Strict):
    """A callable `score(prompts: list[str], responses: list[str]) -> list[float]`, or `async def` of that form."""

    call: Annotated[str, AfterValidator(check_call)]
    """`module:function`; the module is looked for in the working directory too."""
    weight: float = 1.0
    """Factor on its scores in the sum of several functions."""
    batch_size: Execution[Count | None] = None
    """Responses per call; all at once if not given."""
    concurrency: Execution[Count] = 1
    """Calls under way at once."""
    timeout: Execution[Positive | None] = None
    """Seconds that a call may take; no limit if not given."""
    retries: Execution[Annotated[int, Field(ge=0)]] = 0
    """Attempts after one that raised or took too long, after 1, 2, 4, … seconds."""

    @model_validator(mode="after")
    def _concurrency_is_meant(self) -> Self:
        if self.concurrency > 1 and self.batch_size is None:
            raise ValueError(
                f"concurrency={self.concurrency} changes nothing while one call takes all responses. Set batch_size"
            )
        return self


def nearest(word: str, words: Any) -> str:
    """What was probably meant by `word`, or all that is known."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(words))}."


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """`key: old → new` of all that is not the same in two nested values; another model or data set by its name."""
    if isinstance(before, dict) and isinstance(after, dict) and _name(before) == _name(after):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{where}.{key}" if where else str(key)
            yield from differences(before.get(key), after.get(key), inner)
    elif before != after:
        yield f"{where}: {_short(before)} → {_short(after)}"


def _name(value: dict[str, Any]) -> Any:
    return value.get("path") or value.get("call")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = _name(value) or value
    text = "not set" if value is None else str(value)
    return text if len(text) <= 80 else text[:80] + "…"


def validated(kind: type[S], values: dict[str, Any], path: Path) -> S:
    """The values of the file at `path` as a section; ConfigError, in one line, for a wrong one."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, kind)}") from error


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem in one line, and how many more there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    keys, above = _keys(first["loc"], root)
    where = ".".join(map(str, keys))
    if first["type"] == "extra_forbidden":
        known = [name for model in above for name in getattr(model, "model_fields", ())]
        text = f"unknown key {where!r}. {nearest(str(keys[-1]), known)}"
    elif first["type"] == "unknown_key":
        key, known = first["ctx"]["key"], first["ctx"]["known"]
        text = f"unknown key '{where}.{key}'. {nearest(key, known)}"
    elif first["type"] == "missing":
        text = f"{where} is missing. Add it."
    elif first["type"] == "value_error":
        text = f"{where + ': ' if where else ''}{first['ctx']['error']}"
        text += "" if text.endswith((".", "?")) else "."
    else:
        got = repr(first["input"])
        got = got if len(got) <= 200 else got[:200] + "…"
        text = f"{where}={got}: {first['msg'][0].lower()}{first['msg'][1:]}."
    places = {tuple(_keys(problem["loc"], root)[0]) for problem in problems}
    return text + (f" (and {len(places) - 1} more)" if len(places) > 1 else "")


def _keys(location: Sequence[str | int], root: Any) -> tuple[list[str | int], list[Any]]:
    """The keys and indices of one of pydantic's locations, and what may stand where the last of them is looked up.

    A location has, after a value of several types, the name of the one that was tried; that is no key of the recipe.
    """
    keys: list[str | int] = []
    above: list[Any] = []
    types, told = _types(root), False
    for part in location:
        if len(types) > 1 and not told:
            told = True
            continue
        keys.append(part)
        inner = [one for one in (_under(one, part) for one in types) if one is not None]
        above, types, told = types, [kind for one in inner for kind in _types(one)], False
    return keys, above


def _types(annotation: Any) -> list[Any]:
    """What a value may be, None left out."""
    if get_origin(annotation) is Annotated:
        return _types(annotation.__origin__)
    if get_origin(annotation) in (Union, UnionType):
        return [kind for one in get_args(annotation) for kind in _types(one)]
    return [] if annotation is type(None) else [annotation]


def _under(kind: Any, part: str | int) -> Any:
    """The annotation of what stands under a key or an index of a value of that type; None if nothing does."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return field.annotation if field is not None else None
    arguments = get_args(kind)
    return arguments[-1 if get_origin(kind) is dict else 0] if arguments else None

"""One soup: ingredients opened and checked, weights and companions written, the record of what was done."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salsa.artifacts import sha256_tree, versions, write_atomic
from salsa.errors import CheckpointError, ConfigError
from salsa.soup.blend import Plan, Progress, blend
from salsa.soup.diagnostics import Tally, describe, warnings_of
from salsa.soup.files import FLOATS, Tensor, WeightsWriter
from salsa.soup.ingredients import (
    Ingredient,
    check_alike,
    check_base,
    companions,
    heads_of,
)
from salsa.soup.lora import Adapter, MergedAdapter, check_adapters, concatenate, is_adapter
from salsa.soup.methods import Factors
from salsa.soup.mix import DTYPES, Mix


@dataclass(frozen=True)
class Source:
    """A directory, its name for people, and the digest that it must turn out to have."""

    path: Path
    name: str
    expected: str | None = None


class Average:
    """Opened ingredients that go together; a context manager that closes them.

    Raises:
        ConfigError: the options do not fit.
        CheckpointError: an ingredient is broken, or they do not go together.
    """

    def __init__(self, sources: Sequence[Source], mix: Mix, base: Source | None) -> None:
        mix.check(len(sources), has_base=base is not None)
        self.sources, self.mix = sources, mix
        if len({s.path.resolve() for s in sources}) < len(sources) and not mix.allow_identical:
            raise _identical(sources)
        self.base = Ingredient(base.path, base.name, base.expected) if base is not None else None
        self.adapters = [Adapter(s.path, s.name) for s in sources if is_adapter(s.path)]
        self.ingredients: list[Ingredient] = []
        self._fixed: dict[str, Factors] = {}
        try:
            self._check()
        except BaseException:
            self.__exit__()
            raise

    def _check(self) -> None:
        if self.adapters:
            check_adapters(self.adapters)
        if self.adapters and self.base is None:
            self._check_adapters_only()
            return
        left = iter(self.adapters)
        for source in self.sources:
            if is_adapter(source.path):
                assert self.base is not None
                self.ingredients.append(MergedAdapter(next(left), self.base))
            else:
                self.ingredients.append(Ingredient(source.path, source.name, source.expected))
        self._settle_heads()
        check_alike(self.ingredients, self.mix.take_from)
        if self.base is not None:
            check_base(self.base, self.ingredients[0], self._fixed)

    def __enter__(self) -> "Average":
        return self

    def __exit__(self, *_: object) -> None:
        for ingredient in [*self.ingredients, *([self.base] if self.base else [])]:
            ingredient.weights.close()
        for adapter in self.adapters:
            adapter.weights.close()

    def write(self, directory: Path | None, progress: Progress | None) -> dict[str, Any]:
        """Write weights and companions into `directory` (None: only measure); returns the content of `soup.json`."""
        if not self.ingredients:
            return self._concatenate(directory)
        stored = self._stored()
        plan = Plan(
            stored,
            self.mix.rule(len(self.sources)),
            needs_gram=self.mix.method in ("slerp", "model_stock"),
            fixed=self._fixed,
        )
        main = _main(stored, self.ingredients[0].tensors)
        if directory is None:
            tallies = blend(self.ingredients, self.base, plan, None, progress)
            return self._record(tallies, self._digests(), main)
        shapes = {k: (d, self.ingredients[0].tensors[k].shape) for k, d in stored.items()}
        writer = WeightsWriter(directory, shapes)
        try:
            tallies = blend(self.ingredients, self.base, plan, writer, progress)
            files = writer.finish()
        finally:
            writer.close()
        record = self._record(tallies, self._digests(), main)
        self._copy_companions(directory, main)
        return record | {"files": files, "sha256": sha256_tree(directory, known=files)}

    def _concatenate(self, directory: Path | None) -> dict[str, Any]:
        dtype = None if self.mix.dtype == "auto" else DTYPES[self.mix.dtype]
        factors = self.mix.mean(len(self.adapters))
        tallies, stored, files = concatenate(self.adapters, factors, directory, dtype)
        digests = [sha256_tree(a.path, known=a.weights.sha256()) for a in self.adapters]
        self._refuse_identical(digests)
        record = self._record(tallies, digests, stored) | {"adapter": "concatenated"}
        if directory is None:
            return record
        for file in companions([self.adapters[self.mix.take_from or 0].path]):
            shutil.copyfile(file, directory / file.name)
        return record | {"files": files, "sha256": sha256_tree(directory, known=files)}

    def _check_adapters_only(self) -> None:
        if len(self.adapters) < len(self.sources):
            raise CheckpointError(
                f"{self.adapters[0].path}: is an adapter, other ingredients are models. "
                "Give --base, which the adapters are then added to."
            )
        if self.mix.heads is not None:
            raise ConfigError(
                "soup: --heads is about models; an adapter's saved modules are averaged."
            )

    def _settle_heads(self) -> None:
        """Do with heads what was asked for; a head is never averaged, kept or dropped by accident."""
        heads, choice, count = heads_of(self.ingredients), self.mix.heads, len(self.ingredients)
        if not heads and choice is not None:
            raise ConfigError("soup: --heads, but no ingredient has a head. Leave it out.")
        if heads and choice is None:
            holder = next(i for i in self.ingredients if heads[0] in i.tensors)
            raise CheckpointError(
                f"{holder.path}: has a head on top ({heads[0]}). Say what becomes of it: --heads average, drop or "
                "keep-from-0."
            )
        if not heads:
            return
        if choice == "average":
            self._fixed |= dict.fromkeys(heads, self.mix.mean(count))
        elif choice == "drop":
            for ingredient in self.ingredients:
                for key in heads:
                    ingredient.tensors.pop(key, None)
        else:
            keeper = _number(str(choice), count)
            kept = {k: self.ingredients[keeper].tensors.get(k) for k in heads}
            one = Factors(tuple(float(i == keeper) for i in range(count)))
            for key, tensor in kept.items():
                for ingredient in self.ingredients:
                    ingredient.tensors.pop(key, None)
                    if tensor is not None:
                        ingredient.tensors[key] = tensor
                        self._fixed[key] = one

    def _stored(self) -> dict[str, str]:
        """Key → dtype of the result, widest numbers first, then by name: the order in which safetensors writes."""
        stored = {}
        for key, tensor in self.ingredients[0].tensors.items():
            kinds = {i.tensors[key].dtype for i in self.ingredients}
            if not kinds <= FLOATS.keys():
                if len(kinds) > 1:
                    raise CheckpointError(
                        f"soup: {key} is {' and '.join(sorted(kinds))} in different ingredients. Convert them."
                    )
                stored[key] = tensor.dtype
            elif self.mix.dtype != "auto":
                stored[key] = DTYPES[self.mix.dtype]
            elif kinds == {"F16", "BF16"}:
                stored[key] = "F32"
            else:
                stored[key] = min(kinds, key=list(FLOATS).index)
        own = self.ingredients[0].tensors
        return dict(sorted(stored.items(), key=lambda item: (-own[item[0]].itemsize, item[0])))

    def _digests(self) -> list[str]:
        digests = [i.digest() for i in self.ingredients]
        self._refuse_identical(digests)
        return digests

    def _refuse_identical(self, digests: Sequence[str]) -> None:
        if len(set(digests)) < len(digests) and not self.mix.allow_identical:
            raise _identical(
                [s for s, d in zip(self.sources, digests, strict=True) if digests.count(d) > 1]
            )

    def _copy_companions(self, directory: Path, main: str) -> None:
        giver = self.ingredients[self.mix.take_from or 0]
        for file in companions(giver.homes):
            shutil.copyfile(file, directory / file.name)
        config = dict(giver.config)
        name = next(n for n, kind in DTYPES.items() if kind == main)
        if config.pop("torch_dtype", None) != name and config.get("dtype") != name:
            text = json.dumps(config | {"dtype": name}, indent=2)
            write_atomic(directory / "config.json", text + "\n")

    def _record(
        self, tallies: Mapping[str, Tally], digests: Sequence[str], main: str
    ) -> dict[str, Any]:
        weights = self.mix.mean(len(self.sources)).shares.tolist()
        based = self.base is not None or not self.ingredients
        diagnostics = describe(tallies, with_base=based)
        names = [s.name for s in self.sources]
        return {
            "method": self.mix.method,
            "ingredients": [
                {"path": name, "sha256": digest, "weight": weight}
                for name, digest, weight in zip(names, digests, weights, strict=True)
            ],
            "base": self.base and {"path": self.base.name, "sha256": self.base.digest()},
            "alpha": self.mix.alpha,
            "heads": self.mix.heads,
            "settings_from": self.mix.take_from or 0,
            "dtype": main,
            "diagnostics": diagnostics,
            "warnings": warnings_of(diagnostics, names, main),
            "versions": versions(),
        }


def _main(stored: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The float dtype that most elements have."""
    elements = dict.fromkeys(FLOATS, 0)
    for key, kind in stored.items():
        if kind in elements:
            elements[kind] += tensors[key].size
    return max(elements, key=lambda kind: elements[kind])


def _number(choice: str, count: int) -> int:
    number = choice.removeprefix("keep-from-")
    if number == choice or not number.isdecimal() or int(number) >= count:
        raise ConfigError(
            f"soup: heads={choice!r}. Use average, drop or keep-from-I with I from 0 to {count - 1}."
        )
    return int(number)


def _identical(sources: Sequence[Source]) -> CheckpointError:
    names = ", ".join(s.name for s in sources)
    return CheckpointError(
        f"soup: among {names} the same checkpoint is given twice. Give different ones, change its weight, or --force."
    )

"""One soup: ingredients opened and checked, weights and companions written, the record of what was done."""

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from salsa.artifacts import sha256_tree, versions, write_atomic
from salsa.errors import CheckpointError, ConfigError
from salsa.soup.blend import Blend, Progress
from salsa.soup.diagnostics import Tally, describe, warnings_of
from salsa.soup.files import FLOATS, NUMPY_DTYPES, WeightsWriter, widest
from salsa.soup.ingredients import COMPANIONS, HEADS, Ingredient, check_alike, check_base, refuse
from salsa.soup.lora import CONFIG, Adapter, MergedAdapter, adapter_differences, concatenate
from salsa.soup.methods import DTYPES, Factors, Mix


class Source(NamedTuple):
    """A directory, its name for people, and the digest that it must turn out to have."""

    path: Path
    name: str
    expected: str | None = None


def average(
    sources: Sequence[Source],
    base: Source | None,
    mix: Mix,
    directory: Path | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write weights and companions into `directory` (None: only measure); returns the content of `soup.json`.

    Raises:
        ConfigError: the options do not fit.
        CheckpointError: an ingredient is broken, or they do not go together.
    """
    mix.check(len(sources), has_base=base is not None)
    if len({s.path.resolve() for s in sources}) < len(sources) and not mix.allow_identical:
        raise _identical(sources)
    with closing(_Average(sources, base, mix)) as opened:
        return opened.write(directory, progress)


class _Average:
    """The opened ingredients of one soup; what is done with them."""

    def __init__(self, sources: Sequence[Source], base: Source | None, mix: Mix) -> None:
        self.sources, self.mix = sources, mix
        self.base = Ingredient(*base) if base is not None else None
        opened = [Adapter(*s) if (s.path / CONFIG).exists() else Ingredient(*s) for s in sources]
        self.adapters = [one for one in opened if isinstance(one, Adapter)]
        self.side_by_side = bool(self.adapters) and self.base is None
        self._fixed: dict[str, Factors] = {}
        for other in self.adapters[1:]:
            refuse(adapter_differences(self.adapters[0], other))
        if self.side_by_side and len(self.adapters) < len(sources):
            raise CheckpointError(
                f"{self.adapters[0].path}: is an adapter, other ingredients are models. "
                "Give base= (--base), which the adapters are then added to."
            )
        if self.side_by_side and mix.heads is not None:
            raise ConfigError(
                "soup: heads= (--heads) is about models; an adapter's saved modules are averaged. Leave it out."
            )
        self.ingredients = [
            MergedAdapter(one, self.base) if self.base and isinstance(one, Adapter) else one
            for one in opened
        ]

    def close(self) -> None:
        """Close the files of all."""
        for ingredient in [*self.ingredients, *([self.base] if self.base else [])]:
            ingredient.weights.close()

    def write(self, directory: Path | None, progress: Progress | None) -> dict[str, Any]:
        """As `average`."""
        mean = self.mix.mean(len(self.sources))
        if self.side_by_side:
            tallies, main, files = concatenate(self.adapters, self.mix, directory)
        else:
            tallies, main, files = self._blend(directory, progress)
        digests = [i.digest() for i in self.ingredients]
        twice = [s for s, d in zip(self.sources, digests, strict=True) if digests.count(d) > 1]
        if twice and not self.mix.allow_identical:
            raise _identical(twice)
        diagnostics = describe(tallies, with_base=self.base is not None or self.side_by_side)
        names = [s.name for s in self.sources]
        record = {
            "method": self.mix.method,
            "ingredients": [
                {"path": name, "sha256": digest, "weight": weight}
                for name, digest, weight in zip(names, digests, mean.shares.tolist(), strict=True)
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
        if self.side_by_side:
            record["adapter"] = "concatenated"
        if directory is None:
            return record
        self._copy_companions(directory, main)
        return record | {"files": files, "sha256": sha256_tree(directory, known=files)}

    def _blend(
        self, directory: Path | None, progress: Progress | None
    ) -> tuple[dict[str, Tally], str, dict[str, str]]:
        """The sums over each tensor, the float dtype that most elements have, and file name → sha256."""
        self._settle_heads()
        check_alike(self.ingredients, self.mix.take_from)
        tensors = self.ingredients[0].tensors
        if self.base is not None:
            check_base(self.base, self.ingredients[0], self._fixed)
        stored = self._stored()
        main = max(FLOATS, key=lambda d: sum(tensors[k].size for k in stored if stored[k] == d))
        blend = Blend(self.ingredients, self.base, stored, self.mix, self._fixed)
        if directory is None:
            return blend.run(None, progress), main, {}
        shapes = {key: (dtype, tensors[key].shape) for key, dtype in stored.items()}
        with closing(WeightsWriter(directory, shapes)) as writer:
            return blend.run(writer, progress), main, writer.finish()

    def _settle_heads(self) -> None:
        """Do with heads what was asked for; a head is never averaged, kept or dropped by accident."""
        choice, count = self.mix.heads, len(self.ingredients)
        heads = sorted({k for i in self.ingredients for k in i.tensors if k.startswith(HEADS)})
        if not heads:
            if choice is not None:
                raise ConfigError(
                    "soup: heads= (--heads), but no ingredient has a head. Leave it out."
                )
            return
        if choice is None:
            holder = next(i for i in self.ingredients if heads[0] in i.tensors)
            raise CheckpointError(
                f"{holder.path}: has a head on top ({heads[0]}). Say what becomes of it: heads= (--heads) average, "
                "drop or keep-from-0."
            )
        if choice == "average":
            self._fixed |= dict.fromkeys(heads, self.mix.mean(count))
            return
        keepers = {f"keep-from-{i}": i for i in range(count)}
        if choice not in ("drop", *keepers):
            raise ConfigError(
                f"soup: heads={choice!r}. Use average, drop or keep-from-I with I from 0 to {count - 1}."
            )
        keeper = keepers.get(choice)
        for key in heads:
            kept = self.ingredients[keeper].tensors.get(key) if keeper is not None else None
            for ingredient in self.ingredients:
                ingredient.tensors.pop(key, None)
                if kept is not None:
                    ingredient.tensors[key] = kept
            if kept is not None:
                self._fixed[key] = Factors(tuple(float(i == keeper) for i in range(count)))

    def _stored(self) -> dict[str, str]:
        """Key → dtype of the result, widest numbers first, then by name: the order in which safetensors writes."""
        stored = {}
        tensors = self.ingredients[0].tensors
        for key in sorted(tensors, key=lambda k: (-NUMPY_DTYPES[tensors[k].dtype].itemsize, k)):
            dtypes = {i.tensors[key].dtype for i in self.ingredients}
            if dtypes <= FLOATS.keys():
                stored[key] = DTYPES.get(self.mix.dtype) or widest(dtypes)
            elif len(dtypes) == 1:
                stored[key] = tensors[key].dtype
            else:
                raise CheckpointError(
                    f"soup: {key} is {' and '.join(sorted(dtypes))} in different ingredients. Convert them."
                )
        return stored

    def _copy_companions(self, directory: Path, main: str) -> None:
        giver = self.ingredients[self.mix.take_from or 0]
        for name in COMPANIONS:
            if (file := giver.file(name)).is_file():
                shutil.copyfile(file, directory / name)
        if self.side_by_side:
            return
        config = dict(giver.config)
        dtype = next(name for name, stored in DTYPES.items() if stored == main)
        if config.pop("torch_dtype", None) != dtype and config.get("dtype") != dtype:
            text = json.dumps(config | {"dtype": dtype}, indent=2)
            write_atomic(directory / "config.json", text + "\n")


def _identical(sources: Sequence[Source]) -> CheckpointError:
    names = ", ".join(s.name for s in sources)
    return CheckpointError(
        f"soup: among {names} the same checkpoint is given twice. Give different ones, change its weight, or "
        "force=True (--force)."
    )

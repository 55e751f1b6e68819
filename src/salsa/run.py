"""A run directory in Python, finished or still going on. Torch is imported when a model is loaded.

run = Run("runs/quickstart")
run.report["arms"]["salsa"]["mean"]["proxy"]      what report.json says
run.metrics("salsa", seed=0)[-1]["kl"]            what training logged, a row an update
run.to_pandas().pivot_table("score", "step", "arm")
run.chat("How was your day?", arm="salsa")
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from salsa.artifacts import resolve
from salsa.config import Recipe
from salsa.config.expressions import SFT, Base, Given, parse_model, text_of
from salsa.config.schema import nearest, validated
from salsa.errors import CheckpointError, ConfigError
from salsa.stages.directory import policy_label, stage_slug

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from salsa.chat import Speaker

Row = dict[str, Any]


class Run:
    """What a run directory holds. Nothing is cached but the recipe and loaded models: a run may be going on."""

    def __init__(self, path: Path | str) -> None:
        """Open `runs/<name>`.

        Raises:
            ConfigError: there is no run.
        """
        self.path = Path(path)
        if not is_run(self.path):
            raise ConfigError(
                f"{self.path}: no run here (no recipe.yaml beside stages/). Give a directory that salsa run made."
            )
        self._speakers: dict[Path, Speaker] = {}

    def __repr__(self) -> str:
        done, begun = self.stages("finished"), self.stages("begun")
        state = f"working on {', '.join(begun)}" if begun else f"{len(done)} stages finished"
        return f"Run({str(self.path)!r}: {', '.join(self.arms)}; seeds {list(self.seeds)}; {state})"

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, every default written out."""
        file = self.path / "recipe.yaml"
        return validated(Recipe, yaml.safe_load(file.read_text(encoding="utf-8")), file)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms."""
        return tuple(self.recipe.rl.arms)

    @property
    def seeds(self) -> tuple[int, ...]:
        """RL seeds of every arm."""
        return self.recipe.rl.seeds

    @property
    def report(self) -> dict[str, Any]:
        """The content of `report.json`.

        Raises:
            CheckpointError: the run has not come to its report yet.
        """
        if (report := self._report()) is None:
            raise CheckpointError(
                f"{self.path}: no report yet. Finish it with salsa run; metrics of the stages can be read before."
            )
        return report

    def stages(self, state: Literal["finished", "begun"]) -> list[str]:
        """Directory names of the stages that are finished, or that are begun and not finished, without digests."""
        folders = (self.path / "stages").glob("*.partial" if state == "begun" else "*/stage.json")
        names = sorted(f.stem if state == "begun" else f.parent.name for f in folders)
        return [name.rpartition("-")[0] for name in names]

    def metrics(self, name: str, seed: int = 0) -> list[Row]:
        """What a stage logged, a row a step; the rows so far while it runs (docs/metrics.md says what each means).

        Args:
            name: an arm; or a stage such as `sft[0]` or `reward`, which `seed` does not matter to.
            seed: the arm's RL seed.

        Raises:
            CheckpointError: that stage has not begun.
        """
        label = policy_label(name, self._seed(seed)) if name in self.arms else name
        return _whole_rows(self._folder(label) / "metrics.jsonl")

    def samples(self, arm: str, seed: int = 0) -> list[Row]:
        """Replies to the held-out prompts, with scores and KL: a row a prompt; `sft` is the untrained model.

        Raises:
            CheckpointError: the arm is not evaluated yet.
        """
        self._arm(arm, "sft")
        return _whole_rows(
            self._folder(f"eval {arm} seed {self._seed(seed)}", done=True) / "samples.jsonl"
        )

    def checkpoint(self, name: str, seed: int = 0) -> Path:
        """Directory of a model: an arm's policy; or a model of the recipe, such as `sft[0]`, `soup`, `base`, `reward`.

        Raises:
            CheckpointError: it is not made yet.
            ConfigError: there is no such arm or model.
        """
        if name in self.arms:
            return self._folder(policy_label(name, self._seed(seed)), done=True)
        if re.fullmatch(r"reward( soup| seed \d+)?", name):
            return self._reward(name)
        text = self.recipe.eval.shown if name == "sft" else name
        try:
            model = parse_model(text)
        except ValueError:
            self._arm(name, "sft", "sft[0]", "soup", "base")
            raise
        if isinstance(model, Base) and not list(self._folders("base")):
            return resolve(self.recipe.model.path, revision=self.recipe.model.revision)
        if isinstance(model, Given):
            return resolve(model.path)
        given = self.recipe.sft.checkpoints
        if isinstance(model, SFT) and given and not list(self._folders(text_of(model))):
            return resolve(given[model.index])
        return self._folder(text_of(model), done=True)

    def policy(self, name: str, seed: int = 0) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model and its tokenizer, as transformers knows them, fp32 and without dropout; as of `checkpoint`."""
        from salsa.models import load_policy, load_tokenizer
        from salsa.runtime.tracking import quiet_libraries

        quiet_libraries()
        path = self.checkpoint(name, seed)
        return load_policy(path), load_tokenizer(path)

    def chat(
        self,
        message: str,
        *,
        arm: str,
        seed: int = 0,
        history: Sequence[dict[str, str]] = (),
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        sample: int = 0,
    ) -> str:
        """A model's reply.

        Args:
            message: what the user says.
            arm: an arm or another model, as of `checkpoint`.
            seed: the arm's RL seed.
            history: earlier turns, `{"role": …, "content": …}` each.
            temperature: the run's if not given; 0 takes the likeliest token.
            max_new_tokens: the run's if not given.
            sample: the number of the sample: the same one says the same.
        """
        speaker = self.speaker(arm, seed)
        rl = self.recipe.rl
        *_, reply = speaker.stream(
            [*history, {"role": "user", "content": message}],
            temperature=rl.temperature if temperature is None else temperature,
            max_new_tokens=max_new_tokens or rl.max_new_tokens,
            seed=sample,
        )
        return reply

    def speaker(self, arm: str, seed: int = 0) -> "Speaker":
        """A model that replies; loaded once."""
        from salsa.chat import Speaker
        from salsa.runtime.tracking import quiet_libraries

        quiet_libraries()
        path = self.checkpoint(arm, seed)
        if path not in self._speakers:
            self._speakers[path] = Speaker(path)
        return self._speakers[path]

    def to_pandas(self, what: Literal["metrics", "samples"] = "metrics") -> Any:
        """A pandas DataFrame of all arms and seeds that have begun, a row an update; or their held-out `samples`.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError(
                "to_pandas needs pandas. Install it: pip install 'salsa-rlhf[pandas]'"
            ) from error
        return pandas.DataFrame(list(self._rows(what)))

    def _rows(self, what: str) -> Iterator[Row]:
        read = self.metrics if what == "metrics" else self.samples
        for arm in self.arms if what == "metrics" else ("sft", *self.arms):
            for seed in self.seeds:
                try:
                    rows = read(arm, seed)
                except CheckpointError:  # not yet
                    continue
                yield from ({"arm": arm, "seed": seed} | row for row in rows)

    def _reward(self, name: str) -> Path:
        """Of `reward`, the model that RL maximises; of another label, a model that it is the average of."""
        reward = self.recipe.reward
        if (label := reward.stage if name == "reward" else name) is not None:
            return self._folder(label, done=True)
        if reward.paths:
            return resolve(reward.paths[0])
        calls = ", ".join(function.call for function in reward.functions)
        raise ConfigError(f"{self.path}: its reward is no model but {calls}.")

    def _report(self) -> dict[str, Any] | None:
        file = self.path / "report.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def _folders(self, label: str) -> Iterator[Path]:
        """Directories of the stages of that label, of this recipe and of earlier ones that --force replaced."""
        name = re.compile(re.escape(stage_slug(label)) + r"-[0-9a-f]{12}(\.partial)?")
        folders = self.path / "stages"
        return (
            (f for f in folders.iterdir() if name.fullmatch(f.name))
            if folders.is_dir()
            else iter(())
        )

    def _folder(self, label: str, *, done: bool = False) -> Path:
        """The stage that the report shows; before there is one, the stage that was worked on last."""
        shown = {
            stage["stage"]: stage["digest"] for stage in (self._report() or {}).get("stages", ())
        }
        folders = [f for f in self._folders(label) if not (done and f.suffix == ".partial")]
        if label in shown:
            folders = [f for f in folders if f.name.endswith(shown[label][:12])] or folders
        if not folders:
            what = "is not finished" if done else "has not begun"
            begun = ", ".join(self.stages("finished") + self.stages("begun")) or "nothing"
            raise CheckpointError(f"{self.path}: {label} {what}. There so far: {begun}.")
        return max(folders, key=lambda folder: folder.stat().st_mtime)

    def _arm(self, name: str, *others: str) -> None:
        if name not in self.arms and name not in others:
            known = [*self.arms, *others]
            raise ConfigError(f"{self.path}: no arm {name!r}. {nearest(name, known)}")

    def _seed(self, seed: int) -> int:
        if seed not in self.seeds:
            known = ", ".join(map(str, self.seeds))
            raise ConfigError(f"{self.path}: no seed {seed}. Seeds of this run: {known}.")
        return seed


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory."""
    return (path / "recipe.yaml").is_file() and (path / "stages").is_dir()


def _whole_rows(file: Path) -> list[Row]:
    """Rows of a jsonl file that may be written to right now: a last line without its end is left out."""
    if not file.exists():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]

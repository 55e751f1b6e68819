"""The documentation: every block of code is run or says why not, every page is in the navigation, links have ends."""

import re
from pathlib import Path

import pytest
import yaml

from salsa.config import Recipe
from salsa.evaluate.spec import EvalSpec
from tests.doc_blocks import blocks

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(#[\w-]+)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_block_is_run_or_says_why_not(page, repository):
    for block in blocks(page):
        where = f"{page.relative_to(repository)}, line {block.line}"
        assert block.mark, (
            f"{where}: put <!-- run: TEST --> or <!-- not run: WHY --> before the block"
        )
        if block.mark == "run":
            test = repository / block.what
            assert test.is_file(), f"{where}: {block.what} is no test"
            names_it = (
                page.stem in test.read_text() or page.stem.replace("-", "_") in test.read_text()
            )
            assert names_it, f"{where}: {block.what} does not name the page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_to_files_have_an_end(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target, _ in LINK.findall(text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation(repository):
    """Folders in mkdocs.yml stand for all of their pages; nothing is left out."""
    nav = (repository / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"([\w./-]+\.md|[\w-]+/)$", nav, flags=re.M)
    for page in PAGES:
        path = page.relative_to(DOCS).as_posix()
        assert path in listed or f"{Path(path).parent}/" in listed, (
            f"{path}: add it to nav in mkdocs.yml"
        )
    assert all((DOCS / entry).exists() for entry in listed)


def test_folders_and_exports_are_filled_in(repository, monkeypatch):
    import salsa

    monkeypatch.syspath_prepend(str(repository / "scripts"))
    import docs_hooks

    nav = docs_hooks.on_config(
        {"docs_dir": str(DOCS), "nav": [{"How": "how-to/"}, {"A": [{"B": "log.md"}]}]}
    )["nav"]
    assert "how-to/run.md" in nav[0]["How"] and len(nav[0]["How"]) == len(
        list((DOCS / "how-to").glob("*.md"))
    )
    assert nav[1] == {"A": [{"B": "log.md"}]}
    assert set(docs_hooks.exports()) == set(salsa.__all__)
    asked = (DOCS / "api" / "index.md").read_text()
    written = docs_hooks.on_page_markdown(asked)
    assert all(f"::: {module}.{name}" in written for name, module in docs_hooks.exports().items())
    assert docs_hooks.on_page_markdown("as it is") == "as it is"


def test_the_public_api_of_the_design_has_a_reference_entry():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for name in (
        "salsa.objectives", "win_rate", "paired_difference", "parse_rating", "parse_pair_verdict",
        "parse_arena_verdict", "summarise_pairs", "summarise_singles", "forecast", "frontier",
    ):  # fmt: skip
        assert name in text


def test_every_section_of_a_recipe_is_on_the_page_of_keys():
    import salsa.config as config

    page = (DOCS / "api" / "recipe.md").read_text()
    members = re.search(r"members: \[(.*)\]", page)[1].split(", ")
    sections = {n for n, c in vars(config).items() if isinstance(c, type) and n != "Strict"}
    assert set(members) == sections


def test_parts_of_recipes_in_the_how_to_pages_are_sound(repository, tmp_path):
    """run.md shows sections: each must fit into the quickstart; evaluate.md shows a whole evaluation."""
    whole = yaml.safe_load((repository / "recipes" / "quickstart.yaml").read_text())
    parts = {block.language: block for block in blocks(DOCS / "how-to" / "run.md")}
    found = 0
    for block in blocks(DOCS / "how-to" / "run.md"):
        if block.language == "yaml":
            part, recipe = yaml.safe_load(block.code), dict(whole)
            recipe["soup"] = {}
            if "functions" in part["reward"] or "paths" in part["reward"]:
                del recipe["preferences"]  # nothing would learn from them
            if "rl" in part:
                part["rl"] = recipe["rl"] | {
                    "arms": part["rl"]["arms"] | {"ppo": recipe["rl"]["arms"]["ppo"]}
                }
            (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | part))
            Recipe.load(tmp_path / "r.yaml")
            found += 1
    namespace: dict = {}
    exec(parts["python"].code, namespace)
    assert namespace["score"](["p"], ["oh!!"]) == [2.0]
    (judged,) = (b for b in blocks(DOCS / "how-to" / "evaluate.md") if b.language == "yaml")
    assert EvalSpec.read(yaml.safe_load(judged.code), "evaluate.md").baseline == "ppo"
    assert found == 2

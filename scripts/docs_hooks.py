"""mkdocs: folders in the navigation, and the list of what `salsa` exports (mkdocs.yml)."""

import ast
from pathlib import Path
from typing import Any

EXPORTS = "<!-- what salsa exports -->"


def on_config(config: Any) -> Any:
    """Replace every navigation entry that ends in `/` by the pages of that folder: index first, then by name."""
    config["nav"] = [_expanded(entry, Path(config["docs_dir"])) for entry in config["nav"]]
    return config


def _expanded(entry: Any, docs: Path) -> Any:
    if isinstance(entry, list):
        return [_expanded(one, docs) for one in entry]
    if isinstance(entry, dict):
        return {title: _expanded(what, docs) for title, what in entry.items()}
    if isinstance(entry, str) and entry.endswith("/"):
        names = sorted(file.name for file in (docs / entry).glob("*.md"))
        return [entry + name for name in sorted(names, key=lambda name: name != "index.md")]
    return entry


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a reference entry for each export where a page asks for them."""
    if EXPORTS not in markdown:
        return markdown
    names = [f"::: {module}.{name}" for name, module in exports().items()]
    return markdown.replace(EXPORTS, "\n\n".join(names))


def exports() -> dict[str, str]:
    """Name → module of `salsa._EXPORTS`, read off the source."""
    source = Path(__file__).parents[1] / "src" / "salsa" / "__init__.py"
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_EXPORTS":
            return ast.literal_eval(statement.value)
    raise LookupError(f"{source}: no _EXPORTS")

"""The documentation site as `make docs` builds it: whole, and it asks for nothing outside."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("mkdocs", reason="the site needs the extra [docs]")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\" >]+)|<link\b[^>]*\bhref=\"?([^\" >]+)[^>]*>"
)


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_outside(repository, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=repository, capture_output=True, text=True, timeout=300, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    seen = 0
    for page in pages:
        text = page.read_text()
        for source, link in LOADED.findall(text):
            seen += 1
            assert not (source or link).startswith(("http:", "https:", "//")), (
                page.name,
                source or link,
            )
    assert seen > 50, "the pattern finds what pages load"
    sheets = "".join(file.read_text() for file in (tmp_path / "site").rglob("*.css"))
    assert not re.findall(r"url\([\"']?(?:https?:)?//|@import", sheets)
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    assert (
        "run_recipe" in reference
        and "make_soup" in reference
        and "<!-- what salsa exports" not in reference
    )

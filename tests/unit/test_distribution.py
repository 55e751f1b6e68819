"""What `python -m build` makes: all of the package, nothing else, and nothing that names the machine it was made on."""

import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

pytest.importorskip("build", reason="needs build and hatchling (extra [dev])")
pytest.importorskip("hatchling")
PATHS = re.compile(rb"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|opt)/[\w.-]+/[\w.-]+")


@pytest.fixture(scope="module")
def built(repository, tmp_path_factory):
    """The directory with sdist and wheel, the wheel made from the sdist, without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(out),
        str(repository),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_is_the_package_and_nothing_else(wheel, repository):
    source = repository / "src"
    here = {
        file.relative_to(source).as_posix()
        for file in (source / "salsa").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    inside = {name for name in wheel if not name.startswith("salsa_rlhf-")}
    assert inside == here
    assert {
        "salsa/assets/base/model.safetensors",
        "salsa/report/page.html",
        "salsa/py.typed",
    } <= inside


@pytest.mark.slow
def test_the_licence_is_said_and_there(wheel, repository):
    (metadata,) = (text.decode() for name, text in wheel.items() if name.endswith("/METADATA"))
    head = metadata.partition("\n\n")[0].splitlines()
    assert "License-Expression: Apache-2.0" in head and "License-File: LICENSE" in head
    assert not [
        line for line in head if line.startswith(("License:", "Classifier: License"))
    ]  # PEP 639
    (licence,) = (text for name, text in wheel.items() if name.endswith("/licenses/LICENSE"))
    assert licence == (repository / "LICENSE").read_bytes()


@pytest.mark.slow
def test_nothing_names_a_machine(wheel):
    text = {name: data for name, data in wheel.items() if not name.endswith(".safetensors")}
    assert {name: PATHS.findall(data) for name, data in text.items() if PATHS.search(data)} == {}


@pytest.mark.slow
def test_the_sdist_has_sources_recipes_and_papers(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "src", "recipes", "README.md", "CHANGELOG.md", "LICENSE", "SECURITY.md", "constraints.txt", "pyproject.toml",
        "PKG-INFO", ".gitignore",
    }  # fmt: skip
    assert not [name for name in names if "test" in name.split("/")[-1] or "__pycache__" in name]

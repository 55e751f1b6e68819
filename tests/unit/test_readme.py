"""README: the paths of its map exist, every module is on it, its two commands are the Makefile's and CI's."""

import os
import re
import subprocess


def test_map_lists_every_module_and_only_what_exists(repository):
    text = (repository / "README.md").read_text()
    listed = set(re.findall(r"`((?:src|recipes|scripts|docs)/[\w./-]*)`", text))
    for path in listed:
        assert (repository / path).exists(), path
    for file in (repository / "src" / "salsa").rglob("*.py"):
        if file.name.startswith("__"):
            continue
        relative = file.relative_to(repository).as_posix()
        packages = [path for path in listed if path.endswith("/") and relative.startswith(path)]
        in_a_package = any(f"`{relative.removeprefix(path)}`" in text for path in packages)
        assert relative in listed or in_a_package, relative


def test_the_two_commands(repository):
    readme, makefile = (repository / "README.md").read_text(), (repository / "Makefile").read_text()
    commands = re.findall(r"^(make \w+) +#", readme, flags=re.M)
    assert commands == ["make demo", "make test"]
    assert "demo:" in makefile and "test:" in makefile
    assert re.search(r"^make test$", (repository / ".ci" / "run").read_text(), flags=re.M)


def test_make_keeps_bytecode(repository):
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "--eval", "variables: ; @env", "variables"]
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=True
    )
    assert "PATH=" in done.stdout and "PYTHONDONTWRITEBYTECODE" not in done.stdout


def test_recipe_in_the_readme_is_sound(repository, tmp_path):
    from salsa.config import Recipe

    text = (repository / "README.md").read_text()
    (tmp_path / "readme.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, flags=re.S)[1])
    recipe = Recipe.load(tmp_path / "readme.yaml")
    assert recipe.rl.arms["deep"].init == "soup"

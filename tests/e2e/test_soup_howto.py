"""The how-to's DPO example, run as it stands, on two tiny models."""

import json
import os
import re
import shutil

import pytest

from tests.forked import python


@pytest.mark.slow
def test_dpo_with_a_soup_as_its_reference(repository, make_checkpoint, tmp_path):
    text = (repository / "docs" / "how-to" / "soup.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
    for seed in range(2):
        shutil.copytree(make_checkpoint("llama", seed).path, tmp_path / f"sft-{seed}")
    rows = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in range(16)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = python("-c", code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dpo" / "model.safetensors").exists()
    assert "train_loss" in done.stdout

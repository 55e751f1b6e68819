"""The sampler behind a vLLM server: whatever happens to an update or a reply, nothing stale is trained on."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from salsa.config import RLConfig
from salsa.errors import ConfigError, WorkFailed
from salsa.rl import collect_rollout
from salsa.rl_models import load
from salsa.runtime.engine import Engine
from salsa.runtime.sampler.local import left_padded
from salsa.runtime.sampler.vllm import VLLMSampler
from salsa.types import Generation, Rollout
from tests.conftest import tiny_model, wrap
from tests.tiny_rl import FP32, drawn, rows_in, run, weights, without_times
from tests.vllm_server import VLLMServer, fused, one_row, vllm_package

__all__ = ["vllm_package"]
pytestmark = [
    pytest.mark.usefixtures("vllm_package"),
    pytest.mark.filterwarnings("ignore:rl.vllm is experimental"),
]
SMALL = {
    "num_updates": 2, "rollout_size": 4, "minibatch_size": 2, "max_new_tokens": 4, "checkpoint_every": 1,
    "learning_rate": 1e-2,
}  # fmt: skip
ONE = SMALL | {"num_updates": 1}


def by(server, **keys) -> dict:
    """Settings that let the server sample."""
    return {"vllm": {"url": server.url, "timeout": 60} | keys}


def patience(fault) -> dict:
    """A shorter time limit where it is going to pass."""
    return {"timeout": 4} if fault == "silent" else {}


def at(route, number, fault):
    """Faults: one, at one call."""
    return lambda *call: fault if call == (route, number) else None


# a good server


class RowByRow:
    """Samples in this process what the server samples: a row at a time, with a seed each."""

    def __init__(self, model):
        self.model = model

    def generate(self, prompts, sampling, generator):
        seeds = torch.randint(2**31, (len(prompts),), generator=generator).tolist()
        rows = [one_row(self.model, p, sampling, s) for p, s in zip(prompts, seeds, strict=True)]
        width = max(len(tokens) for tokens, _ in rows)
        response = torch.tensor([t + [sampling.pad_id] * (width - len(t)) for t, _ in rows])
        mask = torch.arange(width) < torch.tensor([len(t) for t, _ in rows])[:, None]
        prompt, prompt_mask = left_padded(prompts, sampling.pad_id, response.device)
        rollout = Rollout(prompt, prompt_mask, response, mask)
        return Generation(rollout, torch.zeros_like(mask, dtype=torch.float), self.model.version())


@pytest.mark.parametrize("algorithm", [{}, {"algorithm": "rloo", "group_size": 2}, {"lora": {}}])
@pytest.mark.slow
def test_a_server_with_the_policys_numerics_trains_as_this_process_does(
    job, tmp_path, monkeypatch, algorithm
):
    """What differs is rounding: weights near 1 in place of none."""
    THREE = SMALL | {"num_updates": 3, "learning_rate": 1e-3}
    with VLLMServer() as server:
        there = run(job, tmp_path / "there", **THREE, **by(server), **algorithm)
    monkeypatch.setattr("salsa.rl_models._sampler", lambda policy, config: RowByRow(policy))
    here = run(job, tmp_path / "here", **THREE, **algorithm)
    assert server.calls["/finish_weight_update"] == len(here) == 3
    for a, b in zip(without_times(there), without_times(here), strict=True):
        mismatch = {name: a.pop(name) for name in a.keys() - b.keys()}
        assert mismatch["sampler_kl"] < 1e-9 and mismatch["sampler_logprob_gap"] < 1e-4
        assert mismatch["importance_weight"] == pytest.approx(1, abs=1e-5)
        assert mismatch["importance_capped"] == 0
        assert a.pop("sampler_gap") < 1e-5
        del b["sampler_gap"]  # `RowByRow` does not say what it drew with
        for clipped in a.keys() & {"clip_fraction", "value_clip_fraction"}:
            del a[clipped], b[clipped]  # rounding decides at the edge
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_reward_rises(job, tmp_path):
    with VLLMServer(logit_noise=0.05) as server:  # other numerics, somewhat
        rows = run(
            job, tmp_path / "a", **by(server), num_updates=12, rollout_size=24, minibatch_size=6,
            learning_rate=1e-2, kl_coef=0.0,
        )  # fmt: skip
    first, last = (sum(row["score"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1
    assert all(1e-6 < row["sampler_kl"] < 0.02 for row in rows)


def test_weights_go_out_when_they_have_changed_and_only_then(job):
    with VLLMServer() as server:
        models, source = load(replace(job, config=config_of(job, server)), FP32)
        generator = FP32.generator(0)
        for _ in range(2):
            collect_rollout(models.policy, source, drawn(job, 0), generator)
        assert server.calls["/finish_weight_update"] == 1
        assert server.label == models.policy.version()
        with torch.no_grad():
            models.policy.trained()["model.norm.weight"] += 1
        models.policy.sync()
        collect_rollout(models.policy, source, drawn(job, 0), generator)
    assert server.calls["/finish_weight_update"] == 2
    assert server.label == models.policy.version()
    held = dict(server.model.weights())
    assert all(torch.equal(held[name], weight) for name, weight in models.policy.weights())


def config_of(job, server, **keys):
    return RLConfig(**job.config.model_dump() | by(server, **keys))


def test_what_was_drawn_is_what_the_server_said(job):
    with VLLMServer() as server:
        _, source = load(replace(job, config=config_of(job, server)), FP32)
        ids = [prompt.ids for prompt in drawn(job, 0)]
        generation = source.sampler.generate(ids, source.sampling, FP32.generator(3))
    said = {reply["body"]["seed"]: reply for reply in server.replies}
    seeds = torch.randint(2**31, (len(ids),), generator=FP32.generator(3)).tolist()
    rollout = generation.rollout
    for row, seed in enumerate(seeds):
        mask, reply = rollout.response_mask[row], said[seed]
        assert reply["body"]["prompt"] == list(ids[row])
        assert rollout.prompt[row][rollout.prompt_mask[row]].tolist() == list(ids[row])
        assert rollout.response[row][mask].tolist() == reply["token_ids"]
        expected = reply["logprobs"]["token_logprobs"]
        assert rollout.sampler_logprobs[row][mask].tolist() == pytest.approx(expected)
        assert (rollout.sampler_logprobs[row][~mask] == 0).all()
    assert len(set(seeds)) == len(seeds)


def test_the_size_of_the_mismatch_is_that_of_the_servers_own_words(job, tmp_path):
    """Against sums over the replies; a low cap is felt."""
    cap = 1.05
    with VLLMServer(logit_noise=0.3) as server:
        rows = run(job, tmp_path / "a", **ONE, **by(server, importance_cap=cap))
        policy = wrap(tiny_model("llama", 0))
        logs = []
        for reply in server.replies:
            prompt, tokens = reply["body"]["prompt"], reply["token_ids"]
            logits = policy.backbone(torch.tensor([[*prompt, *tokens]])).logits[0].double()
            after = logits[len(prompt) - 1 : -1].log_softmax(-1)
            ours = after[range(len(tokens)), tokens].tolist()
            logs += zip(ours, reply["logprobs"]["token_logprobs"], strict=True)
    ratios = [math.exp(ours - theirs) for ours, theirs in logs]
    mean = lambda values: sum(values) / len(values)
    (row,) = rows
    assert row["sampler_kl"] == pytest.approx(mean([r - 1 - math.log(r) for r in ratios]), rel=1e-3)
    assert row["sampler_logprob_gap"] == pytest.approx(max(abs(a - b) for a, b in logs), rel=1e-3)
    assert row["importance_weight"] == pytest.approx(mean([min(r, cap) for r in ratios]), rel=1e-4)
    assert row["importance_capped"] == pytest.approx(mean([r > cap for r in ratios]))
    assert 0 < row["importance_capped"] < 1
    assert row["ratio"] == pytest.approx(1, abs=0.2)  # of old logprobs, which are our own


def test_the_weights_reach_the_loss(job, tmp_path):
    """The same replies, another cap: another gradient."""
    rows = []
    for cap in (1.0, 3.0):
        with VLLMServer(logit_noise=0.3) as server:
            rows += run(job, tmp_path / f"{cap}", **ONE, **by(server, importance_cap=cap))
    assert rows[0]["score"] == rows[1]["score"] and rows[0]["sampler_kl"] == rows[1]["sampler_kl"]
    assert rows[0]["grad_norm"] != pytest.approx(rows[1]["grad_norm"], rel=1e-3)


# an update that went wrong is noticed, and a run goes on as if it had not happened

STALE = "after a push of weights"
DAMAGED = "weights are not the policy's"
UPDATES = {
    "drop": ("/update_weights", "drop", DAMAGED),
    "drop all": ("/finish_weight_update", "drop", STALE),
    "late": ("/finish_weight_update", "late", STALE),
    "late weights": ("/finish_weight_update", "late weights", DAMAGED),
    "repeat": ("/update_weights", "repeat", DAMAGED),
    "repeat all": ("/finish_weight_update", "repeat", STALE),
    "corrupt": ("/update_weights", "corrupt", DAMAGED),
    "corrupt label": ("/finish_weight_update", "corrupt", STALE),
    "never answers": ("/update_weights", "silent", "was not answered|took longer than"),
    "reset": ("/update_weights", "reset", "was not answered"),
    "refuses": ("/start_weight_update", "500", "answered 500 .*EngineDeadError"),
    "garbage": ("/weight_info", "garbage", "answered 200"),
    "list": ("/weight_checker", "list", "answered 200"),
}


@pytest.fixture(scope="module")
def untroubled(job, tmp_path_factory):
    """Rows and weights of a run without a fault."""
    directory = tmp_path_factory.mktemp("untroubled") / "a"
    with VLLMServer() as server, pytest.MonkeyPatch.context() as patch:
        vllm_package.__wrapped__(patch)
        rows = run(job, directory, **SMALL, **by(server))
    return without_times(rows), weights(directory)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.slow
def test_an_update_that_went_wrong_is_caught(job, tmp_path, untroubled, name):
    route, fault, message = UPDATES[name]
    number = 3 if route == "/update_weights" else 2  # the second push; it comes in two parts
    with (
        VLLMServer(at(route, number, fault)) as server,
        pytest.raises(WorkFailed, match=message),
    ):
        run(job, tmp_path / "a", **SMALL, **by(server, **patience(fault)))
    rows = rows_in(tmp_path / "a")
    assert without_times(rows) == untroubled[0][:1]  # the second update did not happen
    assert not (tmp_path / "a" / "model.safetensors").exists()
    if name not in ("drop all", "late weights", "corrupt"):  # the others go on the same way
        return
    with VLLMServer() as server:
        rows = run(job, tmp_path / "a", **SMALL, **by(server))
    assert without_times(rows) == untroubled[0]
    assert weights(tmp_path / "a") == untroubled[1]


@pytest.mark.parametrize("name", ["drop", "corrupt"])
@pytest.mark.slow
def test_only_the_sums_notice_bytes_that_are_lost(job, tmp_path, untroubled, name):
    """Without `verify` the label is right and the run goes on: what the check is for."""
    route, fault, _ = UPDATES[name]
    with VLLMServer(at(route, 3, fault)) as server:
        rows = run(job, tmp_path / "a", **SMALL, **by(server, verify=False))
    assert len(rows) == 2 and "/weight_checker" not in server.calls
    if name == "drop":  # it shows in what is logged
        assert rows[1]["sampler_kl"] > 100 * rows[0]["sampler_kl"]
    with VLLMServer(at(route, 1, fault)) as server, pytest.raises(WorkFailed, match=DAMAGED):
        run(job, tmp_path / "first", **ONE, **by(server))


REPLIES = {
    "another version": "changed while it was sampling",
    "two versions": "changed while it was sampling",
    "no version": "lacks something: TypeError",
    "gap": "does not say which weights drew each token",
    "another prompt": "is to another prompt",
    "cut": "breaks off after|has 0 tokens",
    "no logprobs": "without a log-probability",
    "null logprob": "lacks something",
    "unknown token": "tokens that the policy does not know",
    "500": "answered 500",
    "garbage": "answered 200",
    "reset": "was not answered",
    "silent": "was not answered",
}


@pytest.mark.parametrize("fault", REPLIES)
@pytest.mark.slow
def test_a_reply_that_went_wrong_is_caught(job, tmp_path, fault):
    with (
        VLLMServer(at("/v1/completions", 3, fault)) as server,
        pytest.raises(WorkFailed, match=REPLIES[fault]),
    ):
        run(job, tmp_path / "a", **ONE, **by(server, **patience(fault)))
    assert rows_in(tmp_path / "a") == []


def test_all_of_a_rollout_by_another_version_is_stale(job, tmp_path):
    """A second run has pushed its own weights between our push and our prompts."""
    other = lambda route, number: "another version" if route == "/v1/completions" else None
    with VLLMServer(other) as server, pytest.raises(WorkFailed, match="its samples are stale"):
        run(job, tmp_path / "a", **ONE, **by(server))
    assert rows_in(tmp_path / "a") == []


def test_a_transfer_that_hangs_is_left_behind(job, monkeypatch):
    """A broadcast whose peer has died never returns."""
    with VLLMServer() as server:
        _, source = load(replace(job, config=config_of(job, server, timeout=0.3)), FP32)
        engine = SimpleNamespace(send_weights=lambda: __import__("time").sleep(60))
        monkeypatch.setattr("tests.vllm_server.TrainerEngine.trainer_init", lambda *a, **k: engine)
        with pytest.raises(WorkFailed, match=r"pushing weights to it took longer than .*=0\.3 sec"):
            source.sampler.generate([(1, 3)], source.sampling, FP32.generator(0))


# what is asked of a server before anything is sent


def test_nobody_is_there(job, tmp_path):
    with VLLMServer() as server:
        pass
    with pytest.raises(WorkFailed, match=r"/version was not answered \(ConnectionRefusedError"):
        run(job, tmp_path / "a", **by(server))


@pytest.mark.parametrize("version", ["0.22.1", "0.9.0", "nightly"])
def test_an_old_server_is_refused(job, tmp_path, version):
    with (
        VLLMServer(version=version) as server,
        pytest.raises(ConfigError, match=f"vLLM {version} has other calls.* Use 0.33 or newer"),
    ):
        run(job, tmp_path / "a", **by(server))


def test_a_server_without_its_developer_routes_is_refused(job, tmp_path, monkeypatch):
    monkeypatch.delattr(VLLMServer, "init_weight_transfer_engine")
    with VLLMServer() as server, pytest.raises(ConfigError, match="Start it with VLLM_SERVER_DEV"):
        run(job, tmp_path / "a", **by(server))


def test_logprobs_without_the_temperature_are_refused(job, tmp_path):
    with VLLMServer() as server, pytest.raises(ConfigError, match="--logprobs-mode processed"):
        run(job, tmp_path / "a", **by(server), temperature=0.7)
    with VLLMServer(logprobs_mode="processed_logprobs") as server:
        rows = run(job, tmp_path / "a", **ONE, **by(server), temperature=0.7)
    assert max(row["sampler_kl"] for row in rows) < 1e-9


def test_a_sharded_server_cannot_be_verified_and_says_so(job, tmp_path):
    with VLLMServer(ranks=2) as server, pytest.raises(ConfigError, match="rl.vllm.verify: false"):
        run(job, tmp_path / "a", **by(server))
    with VLLMServer(ranks=2) as server:
        assert len(run(job, tmp_path / "a", **ONE, **by(server, verify=False))) == 1
    assert server.init_info["world_size"] == 3  # the trainer and two workers


def test_without_the_package_it_says_what_to_install(job, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm.distributed.weight_transfer", None)
    with VLLMServer() as server, pytest.raises(ConfigError, match=r"Install salsa-rlhf\[vllm\]"):
        run(job, tmp_path / "a", **by(server))


def test_ipc_and_nccl_are_told_what_they_need(job, tmp_path):
    with VLLMServer() as server:
        run(job, tmp_path / "a", **ONE, **by(server, transfer="ipc"))
        assert server.init_info.keys() == {"packed", "packed_buffer_size_bytes", "rank"}
        run(job, tmp_path / "b", **ONE, **by(server))
    info = server.init_info
    assert (info["master_address"], info["world_size"], info["rank"]) == ("127.0.0.1", 2, 0)
    assert 1024 < info["master_port"] < 65536


def test_several_processes_are_refused(job):
    with VLLMServer() as server:
        _, source = load(replace(job, config=config_of(job, server)), FP32)
        source.sampler.model.engine = replace(FP32, world_size=2)
        with pytest.raises(ConfigError, match="by one process, not by 2"):
            source.sampler.generate([(1, 3)], source.sampling, FP32.generator(0))


def test_it_says_that_it_is_experimental():
    with pytest.warns(UserWarning, match="experimental: not run against a real vLLM server"):
        VLLMSampler(wrap(tiny_model()), "http://localhost:1")


# what is sent


def test_bf16_weights_are_sent_and_summed_as_they_compute(tmp_path):
    """Digests of the fused tensors, in the order vLLM concatenates; padded tables are left out."""
    import hashlib

    model = wrap_bf16(tiny_model("llama"))
    sampler = quiet(model)
    sent = dict(sampler._weights.iter_full())
    assert {weight.dtype for weight in sent.values()} == {torch.bfloat16}
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(sent[name], parameter)
    expected = {
        name: hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()
        for name, weight in fused(sent).items()
        if weight.shape[0] != 261  # the vocabulary, which vLLM fills up to 320 rows
    }
    assert sampler._weights.digests() == expected
    assert sum("qkv_proj" in name for name in expected) == 2


@pytest.mark.filterwarnings("ignore:rl.vllm is experimental")
def quiet(model):
    return VLLMSampler(model, "http://localhost:1")


def wrap_bf16(model):
    from salsa.models import LanguageModel

    return LanguageModel(model, Engine.create("bf16"), learns=True)


def test_the_address_decides_nothing_and_the_cap_does():
    plain = RLConfig(kl_coef=0.1)
    of = lambda **keys: RLConfig(kl_coef=0.1, vllm={"url": "http://a:1"} | keys)
    assert "vllm" not in plain.identity() and plain.execution()["vllm"] is None
    assert of().identity()["vllm"] == {"importance_cap": 2.0}
    assert (
        of().identity() == of(url="http://b:2", transfer="ipc", timeout=1, verify=False).identity()
    )
    assert of().identity() != of(importance_cap=3).identity() != plain.identity()
    assert of().execution()["vllm"]["url"] == "http://a:1"
    for wrong in ("localhost:8000", "http://a:1/v1"):
        with pytest.raises(ValueError, match=re.escape("url")):
            of(url=wrong)

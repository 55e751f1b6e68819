"""A vLLM server on localhost, with a tiny model, that loses, delays, repeats and damages what is pushed to it; and the
part of the package vllm that sends weights, which here go over HTTP as bytes.

Both keep to what vLLM 0.33.0 does: routes, bodies and states of `vllm/entrypoints/rl/online/api_router.py` and
`vllm/v1/worker/gpu_worker.py`, order of calls of `NCCLTrainerWeightTransferEngine.send_weights`.
"""

import base64
import hashlib
import json
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest
import torch

from salsa.runtime.sampler import LocalSampler
from salsa.types import Sampling
from tests.conftest import tiny_model, wrap

LATE = 8.0
"""Seconds by which what is delayed is late."""


class VLLMServer:
    """Serves random weights until others are pushed. `faults(route, number)` names a fault of the number-th call."""

    def __init__(
        self,
        faults: Callable[[str, int], str | None] = lambda route, number: None,
        *,
        version: str = "0.33.0",
        logprobs_mode: str = "raw_logprobs",
        ranks: int = 1,
        logit_noise: float = 0.0,
    ) -> None:
        self.faults, self.vllm_version, self.logprobs_mode = faults, version, logprobs_mode
        self.ranks, self.logit_noise = ranks, logit_noise
        self.model = wrap(tiny_model("llama", seed=77), moves=True)
        self.label, self.paused, self.active = "default", False, False
        self.received: dict[str, torch.Tensor] = {}
        self.previous: dict[str, torch.Tensor] = {}
        self.init_info: dict | None = None
        self.calls: Counter[str] = Counter()
        self.replies: list[dict] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"vllm": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.request_queue_size = 256
        self._server.socket.listen(256)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "VLLMServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        self.model.put(dict(self.model.weights()) | weights)

    # what the routes do: (status, answer)

    def init_weight_transfer_engine(self, body, fault):
        self.init_info = body["init_info"]
        return 200, {"message": "Weight transfer initialized"}

    def start_weight_update(self, body, fault):
        if self.active:
            return 500, {"error": "start_weight_update called while a weight update is active"}
        self.active, self.received = True, {}
        return 200, {"message": "Weight update started"}

    def update_weights(self, body, fault):
        if not self.active:
            return 500, {"error": "start_weight_update must be called before update_weights."}
        new = unpacked(body["update_info"])
        if fault == "drop":
            new = {}
        elif fault == "repeat":
            new = {name: self.previous[name] for name in new}
        elif fault == "corrupt":
            name = list(new)[-1]
            new[name].view(torch.int32).view(-1)[0] ^= 1  # the last bit of one number
        self.received |= new
        return 200, {"message": "Weights updated"}

    def finish_weight_update(self, body, fault):
        if not self.active:
            return 500, {"error": "finish_weight_update called without a matching start"}
        self.active, weights, label = False, self.received, body.get("weight_version")
        if fault == "drop":
            return 200, {"message": "Weight update finished"}
        if fault == "late weights":
            later(self.put, weights)
        elif fault == "late":
            later(self.apply, weights, label)
            return 200, {"message": "Weight update finished"}
        else:
            self.put(weights)
        self.label = label
        if fault == "repeat":
            self.apply(self.previous, self.previous_label)
        if fault == "corrupt":
            self.label = label[:-1] + ("0" if label[-1] != "0" else "1")
        self.previous, self.previous_label = weights, label
        return 200, {"message": "Weight update finished"}

    def apply(self, weights, label):
        with self.lock:
            self.put(weights)
            self.label = label

    def weight_checker(self, body, fault):
        assert body == {"action": "checksum"}
        sums = {}
        for rank in range(self.ranks):
            for name, weight in fused(dict(self.model.weights())).items():
                digest = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
                sums[f"dp0:pp0:pcp0:tp{rank}:{name}"] = digest
        return 200, {"checksums": sums}

    def completions(self, body, fault):
        if self.paused:
            return 503, {"error": "Request failed; please retry"}
        prompt, limit = body["prompt"], body["max_tokens"]
        assert body["ignore_eos"] and (body["top_p"], body["top_k"], body["min_p"]) == (1, 0, 0)
        sampling = Sampling(limit, body["temperature"], tuple(body["stop_token_ids"]), 0)
        drawn = one_row(self.model, prompt, sampling, body["seed"], self.logit_noise)
        tokens, logprobs = drawn
        label = "of another run" if fault == "another version" else self.label
        spans = [{"version": label, "start": 0, "end": len(tokens)}]
        if fault == "two versions":
            spans = [
                {"version": "of another run", "start": 0, "end": 1},
                {"version": label, "start": 1, "end": len(tokens)},
            ]
        ended = tokens[-1] in body["stop_token_ids"]
        choice = {
            "index": 0, "text": "", "finish_reason": "stop" if ended else "length",
            "prompt_token_ids": prompt, "token_ids": tokens, "weight_versions": spans,
            "logprobs": {"token_logprobs": logprobs, "tokens": [], "top_logprobs": []},
        }  # fmt: skip
        change = {
            "another prompt": {"prompt_token_ids": [*prompt, 3]},
            "cut": {"token_ids": tokens[:-1], "finish_reason": "abort"},
            "no logprobs": {"logprobs": {"token_logprobs": logprobs[:-1]}},
            "null logprob": {"logprobs": {"token_logprobs": [None, *logprobs[1:]]}},
            "no version": {"weight_versions": None},
            "gap": {"weight_versions": [{"version": label, "start": 0, "end": len(tokens) - 1}]},
            "unknown token": {"token_ids": [999999, *tokens[1:]]},
        }.get(fault or "", {})
        self.replies.append({"body": body, **choice})
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice | change]}


class _Handler(BaseHTTPRequestHandler):
    vllm: VLLMServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict) -> None:
        server, (route, _, query) = self.vllm, self.path.partition("?")
        with server.lock:
            server.calls[route] += 1
            fault = server.faults(route, server.calls[route])
        if fault == "silent":
            time.sleep(LATE)
            self.close_connection = True
            return
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        if fault == "500":
            return self._send(500, {"error": "EngineDeadError"})
        if fault == "garbage":
            return self._send(200, b'{"choices": [{"te\x00')
        if fault == "list":
            return self._send(200, [])
        with server.lock:
            status, answer = self._route(route, query, body, fault)
        self._send(status, answer)

    def _route(self, route: str, query: str, body: dict, fault: str | None) -> tuple[int, dict]:
        server = self.vllm
        match route:
            case "/version":
                return 200, {"version": server.vllm_version}
            case "/server_info":
                model = {"logprobs_mode": server.logprobs_mode}
                return 200, {"vllm_config": {"model_config": model}}
            case "/get_world_size":
                return 200, {"world_size": server.ranks}
            case "/weight_info":
                return 200, {"weight_version": server.label}
            case "/pause":
                assert query == "mode=abort"
                server.paused = True
                return 200, {"status": "paused"}
            case "/resume":
                server.paused = False
                return 200, {"status": "resumed"}
            case "/shutdown_weight_transfer_engine":
                return 200, {"message": "Weight transfer shut down"}
            case "/v1/completions":
                return server.completions(body, fault)
        work = getattr(server, route[1:], None)
        return (404, {"detail": "Not Found"}) if work is None else work(body, fault)

    def _send(self, status: int, answer: dict | list | bytes) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True


def later(work: Callable, *arguments) -> None:
    timer = threading.Timer(LATE, work, arguments)
    timer.daemon = True
    timer.start()


def one_row(model, prompt, sampling, seed, noise=0.0) -> tuple[list[int], list[float]]:
    """What the model says to one prompt with a seed of its own; `noise` on its head makes it another distribution."""
    head = model.backbone.lm_head
    generator = torch.Generator().manual_seed(seed)
    hook = head.register_forward_hook(
        lambda module, inputs, logits: logits + noise * torch.sin(97.0 * logits)
    )
    drawn = LocalSampler(model).generate([prompt], sampling, generator)
    hook.remove()
    mask = drawn.rollout.response_mask[0]
    return drawn.rollout.response[0][mask].tolist(), drawn.logprobs[0][mask].tolist()


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Llama's weights as vLLM keeps them: attention's three inputs as one matrix, the MLP's two as one."""
    joint = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    kept = {
        n: w for n, w in weights.items() if not any(p in n for ps in joint.values() for p in ps)
    }
    for name, parts in joint.items():
        for first in (n for n in weights if parts[0] in n):
            pieces = [weights[first.replace(parts[0], part)] for part in parts]
            kept[first.replace(parts[0], name)] = torch.cat(pieces)
    return kept


def packed(weights: list[tuple[str, torch.Tensor]]) -> dict:
    """Names, types, shapes and bytes as JSON values."""
    return {
        "names": [name for name, _ in weights],
        "dtype_names": [str(weight.dtype).split(".")[-1] for _, weight in weights],
        "shapes": [list(weight.shape) for _, weight in weights],
        "bytes": base64.b64encode(
            b"".join(w.view(torch.uint8).numpy().tobytes() for _, w in weights)
        ).decode(),
    }


def unpacked(info: dict) -> dict[str, torch.Tensor]:
    """The fp32 weights that `packed` wrote."""
    data, start, weights = bytearray(base64.b64decode(info["bytes"])), 0, {}
    columns = (info["names"], info["dtype_names"], info["shapes"])
    for name, kind, shape in zip(*columns, strict=True):
        size = torch.empty(shape, dtype=getattr(torch, kind)).nbytes
        flat = torch.frombuffer(data[start : start + size], dtype=getattr(torch, kind))
        weights[name], start = flat.view(shape).float(), start + size
    assert start == len(data)
    return weights


# the part of the package vllm that runs in the trainer


@dataclass
class NCCLTrainerInitInfo:
    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    packed_buffer_size_bytes: int = 2**30
    rank: int = field(kw_only=True)


@dataclass
class IPCTrainerInitInfo:
    packed: bool = False
    packed_buffer_size_bytes: int = 2**30
    rank: int = field(kw_only=True)


class TrainerEngine:
    """`NCCLTrainerWeightTransferEngine`, but that bytes go with `update_weights`, in two parts."""

    def __init__(self, client, source):
        self.client, self.source = client, source

    @classmethod
    def trainer_init(cls, init_info, *, client, source):
        assert source.implements_iter_full() and not source.implements_iter_local()
        assert all(m.owners is None or m.owners[0] == 0 for m in source.metadata)
        assert len(source.owned_names(init_info.rank)) == len(source.metadata)
        client.init_weight_transfer_engine(dict(vars(init_info)))
        return cls(client, source)

    def send_weights(self):
        self.client.start_weight_update()
        pairs = list(self.source.iter_full())
        told = [(m.name, m.dtype, m.shape) for m in self.source.metadata]
        assert told == [(name, w.dtype, tuple(w.shape)) for name, w in pairs]
        half = len(pairs) // 2
        for part in (pairs[:half], pairs[half:]):
            self.client.update_weights(packed(part))
        self.client.finish_weight_update()


@pytest.fixture
def vllm_package(monkeypatch):
    """`import vllm…` finds the above."""
    parts = {
        "vllm": {}, "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {"WeightTransferTrainerFactory": TrainerEngine},
        "vllm.distributed.weight_transfer.ipc_engine": {"IPCTrainerInitInfo": IPCTrainerInitInfo},
        "vllm.distributed.weight_transfer.nccl_engine": {"NCCLTrainerInitInfo": NCCLTrainerInitInfo},
    }  # fmt: skip
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

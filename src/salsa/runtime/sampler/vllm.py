"""Sample with a vLLM server that holds a copy of the policy. Experimental: not run against a real server on a GPU yet.

    push       POST /pause                          in-flight requests end, the prefix cache is dropped
               POST /init_weight_transfer_engine    once, through vLLM's trainer engine (NCCL, or CUDA IPC on one GPU)
               POST /start_weight_update, /update_weights, /finish_weight_update {weight_version: digest of the policy}
               POST /resume
    check      GET /weight_info                     the label is the policy's digest
               POST /weight_checker                 sha256 of the server's tensors are those of what was sent
    generate   POST /v1/completions                 token ids in and out, with logprobs, and the label of the weights
                                                    that drew each token

Written against the source of vLLM 0.33.0 (vllm/entrypoints/rl/online/api_router.py, vllm/distributed/weight_transfer,
vllm/entrypoints/openai/completion/protocol.py), whose routes are there with VLLM_SERVER_DEV_MODE=1. Older versions
speak otherwise (the calls changed in 0.17, in 0.22, and after it) and are refused.

The weights that speak are the policy's or the run stops: a label alone would not notice bytes that were lost on their
way, and sums of the server's bytes alone would not notice which weights an answer is of. Nothing is tried twice, for a
run goes on from its last checkpoint. Other numerics of the same weights are corrected in the loss, by what the sampler
says of its own tokens (`Rollout.sampler_logprobs`).
"""

import base64
import hashlib
import http.client
import json
import math
import pickle
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from salsa.errors import ConfigError, WorkFailed
from salsa.runtime.sampler.local import left_padded
from salsa.types import Generation, Rollout, Sampling

if TYPE_CHECKING:
    from salsa.models import LanguageModel

OLDEST = (0, 33)
"""The first version whose calls are known here."""
REQUESTS_AT_ONCE = 256
"""vLLM decodes as many sequences at once by default."""
PACKED_BYTES = 256 * 2**20
"""Weights are sent in buffers of this size; two of them are alive on either side."""
_VOCABULARY_ROWS = 64
"""vLLM pads embeddings to a multiple of this; padded ones have other bytes than ours."""
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}  # fmt: skip
"""Layers that vLLM keeps as one, our rows one after another."""


class VLLMSampler:
    """A sampler that pushes the weights of a model to a vLLM server whenever they have changed."""

    def __init__(
        self,
        model: "LanguageModel",
        url: str,
        *,
        transfer: str = "nccl",
        timeout: float = 600.0,
        verify: bool = True,
    ) -> None:
        """Nothing is sent before the first `generate`; arguments as `salsa.config.rl.VLLMConfig` describes them."""
        warnings.warn(
            "rl.vllm is experimental: not run against a real vLLM server on a GPU yet.",
            stacklevel=2,
        )
        self.model, self.server = model, VLLMServer(url, timeout)
        self._transfer, self._verify = transfer, verify
        self._weights = SentWeights(model, hashed=verify)
        self._engine: Any = None
        self._pushed: str | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
    ) -> Generation:
        """Sample one response per prompt; see `Sampler.generate`. The server's noise is not that of this process.

        Raises:
            ConfigError: vLLM is missing here, or the server is too old or not set up for this.
            WorkFailed: the server fails, or does not hold the policy's weights.
        """
        if self._engine is None:
            self._engine = self._connect(sampling)
        if self._pushed != (version := self.model.version()):
            self._push(version)
        seeds = torch.randint(2**31, (len(prompts),), generator=generator, device=generator.device)
        ask = lambda prompt, seed: self.server.complete(prompt, sampling, seed)
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            replies = list(pool.map(ask, prompts, seeds.tolist()))
        spoke = {label for reply in replies for label in reply.versions}
        if len(spoke) > 1:
            raise WorkFailed(
                f"{self.server}: weights changed while it was sampling: {_shortened(spoke)}. Is another run using it? "
                "One server serves one run at a time (--jobs 1)."
            )
        here = self.model.engine.device
        prompt, prompt_mask = left_padded(prompts, sampling.pad_id, here)
        response = _padded([reply.tokens for reply in replies], sampling.pad_id, here)
        logprobs = _padded([reply.logprobs for reply in replies], 0.0, here)
        if (
            not 0
            <= int(response.min())
            <= int(response.max())
            < self.model.backbone.config.vocab_size
        ):
            raise WorkFailed(f"{self.server}: a reply has tokens that the policy does not know.")
        lengths = torch.tensor([len(reply.tokens) for reply in replies], device=here)
        mask = torch.arange(response.shape[1], device=here) < lengths[:, None]
        rollout = Rollout(prompt, prompt_mask, response, mask, logprobs)
        return Generation(rollout, logprobs, spoke.pop())

    def _connect(self, sampling: Sampling) -> Any:
        """Is it a server that will do? Then open the way for the weights."""
        server, processes = self.server, self.model.engine.world_size
        if processes > 1:
            raise ConfigError(f"rl.vllm: weights are pushed by one process, not by {processes}.")
        version = str(server.get("/version").get("version"))
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
            raise ConfigError(
                f"{server}: vLLM {version} has other calls to transfer weights. Use {OLDEST[0]}.{OLDEST[1]} or newer."
            )
        if sampling.temperature != 1:
            config = server.get("/server_info?config_format=json").get("vllm_config", {})
            if (
                mode := config.get("model_config", {}).get("logprobs_mode")
            ) != "processed_logprobs":
                raise ConfigError(
                    f"{server}: it reports {mode}, which leave out rl.temperature={sampling.temperature:g}. Serve with "
                    "--logprobs-mode processed_logprobs, or set rl.temperature to 1."
                )
        ranks = server.get("/get_world_size")["world_size"]
        open_way = lambda: trainer_engine(self._transfer, server, self._weights, ranks)
        return self._in_time("connecting to", open_way)

    def _push(self, version: str) -> None:
        """Send all weights and see that they have arrived."""
        server, self._pushed = self.server, None
        server.label = version
        server.post("/pause?mode=abort")
        self._in_time("pushing weights to", self._engine.send_weights)
        server.post("/resume")
        if (held := server.get("/weight_info").get("weight_version")) != version:
            raise WorkFailed(
                f"{server}: after a push of weights {version[:12]} it holds {str(held)[:12]}: the update was lost, "
                f"late or another run's. {_AGAIN}"
            )
        if self._verify:
            self._compare(server.post("/weight_checker", {"action": "checksum"})["checksums"])
        self._pushed = version

    def _compare(self, theirs: Mapping[str, str]) -> None:
        """Is what the server holds, tensor by tensor, what was sent?"""
        ours = self._weights.digests()
        held = {key.rpartition(":")[2]: digest for key, digest in theirs.items()}
        common = ours.keys() & held.keys()
        if not common or len(held) < len(theirs):  # shards of one tensor have one name
            raise ConfigError(
                f"{self.server}: its weights are sharded or quantized, so they cannot be compared with the policy's. "
                "Serve with --tensor-parallel-size 1 and without quantization, or set rl.vllm.verify: false."
            )
        if wrong := sorted(name for name in common if ours[name] != held[name]):
            raise WorkFailed(
                f"{self.server}: after a push {len(wrong)} of {len(common)} weights are not the policy's, first "
                f"{wrong[0]}: some were lost or damaged, or it serves in another precision than "
                f"{self._weights.dtype} (--dtype). {_AGAIN}"
            )

    def _in_time(self, what: str, work: Callable[[], Any]) -> Any:
        """Do `work` in a thread, left behind if it takes too long: a broadcast without its peer never returns."""
        done: list[Any] = []
        failed: list[BaseException] = []
        here, timeout = self.model.engine.device, self.server.timeout

        def run() -> None:
            try:
                if here.type == "cuda":
                    torch.cuda.set_device(here)
                done.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            raise WorkFailed(
                f"{self.server}: {what} it took longer than rl.vllm.timeout={timeout:g} seconds. {_AGAIN}"
            )
        if failed:
            if isinstance(failed[0], ConfigError | WorkFailed):
                raise failed[0]
            words = f"{type(failed[0]).__name__}: {failed[0]}"
            raise WorkFailed(f"{self.server}: {what} it failed: {words}. {_AGAIN}") from failed[0]
        return done[0]


_AGAIN = (
    "Start the server anew and type the same command: the run goes on from its last checkpoint."
)


class Parameter(NamedTuple):
    """As vLLM's ParamMeta: what it is told of a weight before its bytes come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    owners: None = None
    """Every trainer rank."""


class SentWeights:
    """The policy's weights as vLLM's trainer engine asks for them (a WeightSource), in the policy's arithmetic.

    Adapters are merged. While they are sent, their bytes are hashed.
    """

    def __init__(self, model: "LanguageModel", *, hashed: bool) -> None:
        self._model, self._hashed = model, hashed
        self.dtype = model.engine.dtype
        self._hashes: dict[str, Any] = {}

    @cached_property
    def metadata(self) -> list[Parameter]:
        """Every weight, in the order of `iter_full`."""
        return [Parameter(n, self.dtype, tuple(w.shape)) for n, w in self._model.weights()]

    def owned_names(self, rank: int) -> list[str]:
        """All of them, on the only rank."""
        return [parameter.name for parameter in self.metadata]

    def implements_iter_full(self) -> bool:
        """Whether whole tensors can be had."""
        return True

    def implements_iter_local(self) -> bool:
        """Whether a rank's shards can be had."""
        return False

    @torch.no_grad()
    def iter_full(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each weight."""
        self._hashes = {}
        for name, weight in self._model.weights():
            lowered = weight.detach().to(self.dtype).contiguous()
            if self._hashed and not self._padded_there(lowered):
                self._hash(name, lowered)
            yield name, lowered

    def digests(self) -> dict[str, str]:
        """Hex sha256 of the bytes that were sent last, by the names that vLLM gives its parameters."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def _padded_there(self, weight: Tensor) -> bool:
        """Whether vLLM keeps this table of tokens with more rows than it has."""
        rows = self._model.backbone.config.vocab_size
        return weight.ndim == 2 and weight.shape[0] == rows and rows % _VOCABULARY_ROWS != 0

    def _hash(self, name: str, weight: Tensor) -> None:
        *path, layer, kind = ("", *name.split("."))
        fused = ".".join([*path, _FUSED.get(layer, layer), kind]).lstrip(".")
        digest = self._hashes.setdefault(fused, hashlib.sha256())
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())


def trainer_engine(
    transfer: str, server: "VLLMServer", weights: SentWeights, server_ranks: int
) -> Any:
    """The engine of vLLM that sends `weights` to the server's `server_ranks` workers at each `send_weights()`.

    Raises:
        ConfigError: the package vllm is not installed here, or has no such engine.
    """
    try:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:
        raise ConfigError(
            f"rl.vllm needs the package vllm, of the server's version, in this environment too ({error}). "
            "Install salsa-rlhf[vllm]."
        ) from error
    server.post("/shutdown_weight_transfer_engine")  # an earlier run's connection
    if transfer == "ipc":
        how = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=PACKED_BYTES, rank=0)
    else:
        how = NCCLTrainerInitInfo(
            *server.meeting_point(), world_size=1 + server_ranks, rank=0,
            packed_buffer_size_bytes=PACKED_BYTES,
        )  # fmt: skip
    return WeightTransferTrainerFactory.trainer_init(how, client=server, source=weights)


class Reply(NamedTuple):
    """One sampled response: token ids, log-probabilities in nats, and the labels of the weights that drew it."""

    tokens: list[int]
    logprobs: list[float]
    versions: set[str]


class VLLMServer:
    """A vLLM server over HTTP; also the client that vLLM's trainer engine drives an update with.

    Every call raises WorkFailed where the server cannot be reached, takes too long, or answers anything but 200 and a
    JSON object.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self.label: str | None = None
        """What the weights of the next update are to be called."""

    def __str__(self) -> str:
        return f"vLLM at {self.url}"

    def get(self, path: str) -> dict[str, Any]:
        """The answer to a GET."""
        return self._call("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a POST of JSON."""
        return self._call("POST", path, json.dumps(body or {}))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the server's end of the transfer."""
        self.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Weights are about to come."""
        self.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Some of the weights: their names and shapes, and for IPC where on the GPU they lie."""
        info = {key: value for key, value in update_info.items() if key != "ipc_handles"}
        if (handles := update_info.get("ipc_handles")) is not None:  # no JSON: vLLM takes a pickle
            info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self.post("/update_weights", {"update_info": info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All weights have come; from now on they are called `label`."""
        self.post("/finish_weight_update", {"weight_version": weight_version or self.label})

    def meeting_point(self) -> tuple[str, int]:
        """Address of this machine as the server sees it, and a free port."""
        parts = urlsplit(self.url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing
            address = probe.getsockname()[0]
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def complete(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Reply:
        """One response to one prompt. Nothing of the model's generation_config decides how it is drawn."""
        answer = self.post("/v1/completions", {
            "prompt": list(prompt), "seed": seed, "n": 1, "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": True, "stop_token_ids": list(sampling.eos_ids), "add_special_tokens": False,
            "logprobs": 0, "return_token_ids": True, "return_weight_versions": True,
        })  # fmt: skip
        try:
            (choice,) = answer["choices"]
            spans = choice["weight_versions"]
            reply = Reply(
                choice["token_ids"], choice["logprobs"]["token_logprobs"],
                {span["version"] for span in spans},
            )  # fmt: skip
            problem = _problem(choice, spans, prompt, sampling)
        except (KeyError, TypeError, ValueError) as error:
            raise WorkFailed(
                f"{self}: a reply lacks something: {type(error).__name__} {error}."
            ) from error
        if problem:
            raise WorkFailed(f"{self}: a reply {problem}. Nothing of this rollout was trained on.")
        return reply

    def _call(self, method: str, path: str, body: str | None) -> dict[str, Any]:
        parts, name = urlsplit(self.url), path.partition("?")[0]
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(parts.netloc, timeout=self.timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise WorkFailed(
                f"{self}: {name} was not answered ({type(error).__name__}: {error}). {_AGAIN}"
            ) from error
        finally:
            connection.close()
        if response.status == 404:
            raise ConfigError(
                f"{self}: it has no {name}. Start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config."
            )
        try:
            answer = json.loads(text) if response.status == 200 else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            words = text[:300].decode(errors="replace")
            raise WorkFailed(f"{self}: {name} answered {response.status} {words!r}. {_AGAIN}")
        return answer


def _problem(
    choice: Mapping[str, Any], spans: Any, prompt: Sequence[int], sampling: Sampling
) -> str | None:
    """What is wrong with a reply, if anything; KeyError or TypeError if it has another form."""
    tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    ends = [number for number, token in enumerate(tokens) if token in sampling.eos_ids]
    if choice["prompt_token_ids"] != list(prompt):
        return "is to another prompt"
    if not tokens or len(tokens) > sampling.max_new_tokens or ends not in ([], [len(tokens) - 1]):
        return f"has {len(tokens)} tokens with ends at {ends}"
    if not ends and len(tokens) < sampling.max_new_tokens:
        return f"breaks off after {len(tokens)} tokens ({choice['finish_reason']})"
    if len(logprobs) != len(tokens) or not all(math.isfinite(x) and x < 1e-3 for x in logprobs):
        return "has tokens without a log-probability"
    if [span["start"] for span in spans] != [0, *(span["end"] for span in spans[:-1])] or (
        spans[-1]["end"] != len(tokens)
    ):
        return "does not say which weights drew each token"
    return None


def _padded(rows: Sequence[Sequence[Any]], value: float, device: torch.device) -> Tensor:
    """Rows right-padded to the longest."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)


def _shortened(versions: set[str]) -> str:
    return ", ".join(sorted(version[:12] for version in versions))

"""A chat endpoint on localhost that fails in every way real ones do."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "timeout", "reset", "half", "garbage", "no choices", "null", "html")


class JudgeServer:
    """Serves `answer(prompt)`; `faults(prompt, attempt)` names a fault of `FAULTS`, a status, or None."""

    def __init__(
        self,
        answer: Callable[[str], str] = lambda prompt: "[[A]]",
        faults: Callable[[str, int], str | None] = lambda prompt, attempt: None,
        seconds: float = 0.0,
    ) -> None:
        self.answer, self.faults, self.seconds = answer, faults, seconds
        self.attempts: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.headers: list[str] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"judge": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.request_queue_size = 256
        self._server.socket.listen(256)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def begin(self, prompt: str, key: str) -> str | None:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.attempts[prompt] += 1
            self.headers.append(key)
            fault = self.faults(prompt, self.attempts[prompt])
            self.injected[fault or "none"] += 1
            return fault

    def end(self, prompt: str, delivered: bool) -> None:
        with self._lock:
            self.at_once -= 1
            self.delivered[prompt] += delivered


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        fault = self.judge.begin(prompt, self.headers.get("Authorization", ""))
        time.sleep(self.judge.seconds)
        delivered = False
        try:
            delivered = self._respond(body, prompt, fault)
        except OSError:
            self.close_connection = True
        finally:
            self.judge.end(prompt, delivered)

    def _respond(self, body: dict, prompt: str, fault: str | None) -> bool:
        reply = {
            "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{
                "index": 0, "finish_reason": "stop",
                "message": {"role": "assistant", "content": self.judge.answer(prompt)},
            }],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
        }  # fmt: skip
        if fault == "429":
            self._send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.05"})
        elif fault == "timeout":
            time.sleep(1.5)
            self.close_connection = True
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
        elif fault == "half":
            whole = json.dumps(reply).encode()
            self._send(200, whole[: len(whole) // 2], {"Content-Length": str(len(whole))})
            self.close_connection = True
        elif fault == "garbage":
            self._send(200, b'{"choices": [{"mess\x00')
        elif fault == "no choices":
            self._send(200, json.dumps(reply | {"choices": []}).encode())
        elif fault == "null":
            reply["choices"][0]["message"]["content"] = None
            self._send(200, json.dumps(reply).encode())
        elif fault == "html":
            self._send(200, b"<html>busy</html>", {"Content-Type": "text/html"})
        elif fault is not None:
            echo = self.headers.get("Authorization", "")
            self._send(int(fault), json.dumps({"error": {"message": f"no, {echo}"}}).encode())
        else:
            self._send(200, json.dumps(reply).encode())
            return True
        return False

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in (given | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

"""A program that behaves as an inference engine does, or misbehaves: `fake_engine.py MODE --port P [...]`."""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

mode, arguments = os.environ.get("FAKE_ENGINE", "well"), sys.argv[1:]
if here := os.environ.get("FAKE_ENGINE_TOLD"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(here).write_text(json.dumps({"arguments": arguments, "pids": [os.getpid(), child.pid]}))
print("fake engine: loading with the key sk-proj-Abcd1234Efgh5678Ijkl", flush=True)
if mode == "dies":
    sys.exit("ValueError: the shards are of another model")
if mode == "points back":
    print("ERROR 11-24 [core.py:9] Traceback (most recent call last):", flush=True)
    print("ERROR 11-24 [core.py:9] ValueError: the heads are not divisible", flush=True)
    print("\n".join(f"  frame {number}" for number in range(100)), flush=True)
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
if mode == "memory":
    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 14.00 GiB", flush=True)
    sys.exit(1)
if mode == "cut short":
    print("E llama_model_load: error loading model: model is corrupted or incomplete", flush=True)
    sys.exit(1)
if mode == "illegal":
    os.kill(os.getpid(), signal.SIGILL)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "never":
    time.sleep(600)
if os.environ.get("VLLM_API_KEY"):
    mode = "refuses"
ready_at = time.monotonic() + 0.5


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200 if time.monotonic() > ready_at else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mode == "refuses":
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if mode == "strict" and "thinking_budget" in body:
            refusal = b'{"detail": "Unexpected fields in the request: {\'thinking_budget\'}"}'
            self.send_response(422)
            self.send_header("Content-Length", str(len(refusal)))
            self.end_headers()
            self.wfile.write(refusal)
            return
        deltas = [{"reasoning_content": "2 and 2"}, {"content": "is 4"}]
        pieces = [{"model": body["model"], "choices": [{"index": 0, "delta": d}]} for d in deltas]
        pieces.append({"model": body["model"], "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        text = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


ThreadingHTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()

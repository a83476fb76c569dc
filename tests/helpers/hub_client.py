"""A Python process that runs what it is sent: huggingface_hub reads its environment once, when it is imported.

`Client(env)` starts one; `client.run(code)` gives what the code assigned to `result`, or raises `Failed`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.paths import ROOT, TESTS

TOKEN = "hf_LoopbackOnlyLoopbackOnlyLoopbackOnly"
LOAD = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(repo).eval()
with torch.no_grad():
    result = model(torch.tensor(ids)).logits.tolist()
"""


class Failed(Exception):
    """The code raised: name of the exception's class, its message, and the traceback as printed."""

    def __init__(self, kind: str, message: str, traceback: str):
        super().__init__(f"{kind}: {message}\n{traceback}")
        self.kind, self.message, self.traceback = kind, message, traceback


class Client:
    """One process; its output so far is in the file `log`."""

    def __init__(self, env: Mapping[str, str], log: Path):
        self.log = log
        keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**keep, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
            cwd=ROOT,
        )

    def send(self, code: str, **values: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"code": code, "values": values}, default=str) + "\n")
        self.process.stdin.flush()

    def run(self, code: str, **values: Any) -> Any:
        assert self.process.stdout is not None
        self.send(code, **values)
        line = self.process.stdout.readline()
        assert line, f"the client died:\n{self.log.read_text()[-3000:]}"
        reply = json.loads(line)
        if "kind" in reply:
            raise Failed(**reply)
        return reply["result"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start(folder: Path, url: str, **env: str) -> Client:
    """A client of the Hub at `url`, with its cache and its log in `folder`."""
    own = {
        "HF_ENDPOINT": url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }
    return Client(own | env, folder / "log")


def serve() -> None:
    """Read a line of JSON, run its code, answer with a line of JSON; what the code prints goes to the log."""
    import time
    import traceback
    from types import SimpleNamespace

    import huggingface_hub.utils._http as http

    http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # type: ignore[attr-defined]
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        namespace: dict[str, Any] = {"result": None, **asked["values"]}
        try:
            exec(asked["code"], namespace)
            reply: dict[str, Any] = {"result": namespace["result"]}
        except BaseException as error:
            reply = {"kind": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        print(json.dumps(reply, default=str), file=answers, flush=True)


if __name__ == "__main__":
    serve()

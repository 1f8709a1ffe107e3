"""`vllm serve` as a user starts it: answers, many requests at once, requests given up, prompts that are too long."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .conftest import NEW, Checkpoint, environment, greedy, prompt


def ask(server: str, path: str, timeout: float = 120, **body: Any) -> Any:
    """The server's answer to a request as JSON."""
    request = urllib.request.Request(
        server + path, data=json.dumps(body).encode() if body else None, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def complete(server: str, ids: list[int], **more: Any) -> list[int]:
    """Greedy token ids that follow a prompt of token ids."""
    body = {"prompt": ids, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}
    found: list[int] = ask(server, "/v1/completions", **body)["choices"][0]["token_ids"]
    return found


@pytest.fixture(scope="module")
def server(coarse: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--max-model-len", "512", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]
    command = [Path(sys.executable).with_name("vllm"), "serve", coarse[0]]
    options += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen([*command, *options], env=environment(), stdout=out, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            assert process.poll() is None, log.read_text()[-6000:]
            try:
                ask(address, "/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-6000:])
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_answers_are_those_of_transformers(coarse: Checkpoint, server: str) -> None:
    ids = prompt(150, 11)
    assert complete(server, ids) == greedy(coarse[1], ids)


def test_64_requests_at_once(coarse: Checkpoint, server: str) -> None:
    prompts = [prompt(30 + 5 * (i % 8), 100 + i) for i in range(64)]  # of one block or less: nothing to share
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda ids: complete(server, ids), prompts))
    want = [greedy(coarse[1], ids) for ids in prompts]
    assert found == want


def test_requests_that_are_given_up_free_their_memory(coarse: Checkpoint, server: str) -> None:
    for seed in range(8):
        with pytest.raises(OSError):  # the client goes away after a moment
            ask(server, "/v1/completions", timeout=0.2, prompt=prompt(200, 300 + seed), max_tokens=300, ignore_eos=True)
    for _ in range(100):
        with urllib.request.urlopen(server + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        running = [float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running")]
        if running == [0.0]:
            break
        time.sleep(0.5)
    assert running == [0.0]
    used = [float(line.split()[-1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc")]
    assert used == [0.0]
    ids = prompt(90, 12)
    assert complete(server, ids) == greedy(coarse[1], ids)


def test_a_prompt_that_is_too_long_is_an_error(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        complete(server, prompt(600, 13))
    assert caught.value.code == 400 and "512" in caught.value.read().decode()

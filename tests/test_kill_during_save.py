"""``kill -9`` at random moments during saves: the old session or the new one is always there."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import adms
from adms.session import load_session
from tests.test_session import CODED, llama, run, text

KILLS = 200
# Importing torch takes seconds, so one process forks a saver for every kill.
SERVER = """
import os, sys
import adms
from tests.test_session import llama, run, text

path, model = sys.argv[1], llama()
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        continue
    cache = adms.ADMSKVCache.load(path, model=model)
    # Large, so that a kill often falls into the writing.
    ballast = "x" * 2_000_000
    while True:
        run(model, text(1, seed=cache.tokens_seen), cache)
        cache.save(path, notes={"ballast": ballast, "tokens": cache.tokens_seen})
"""


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
def test_a_session_survives_kill_9(tmp_path: Path) -> None:
    chooser = random.Random(0)
    path, model = tmp_path / "a.adms", llama()
    cache = adms.enable_adms_llm(model, **CODED)
    run(model, text(100), cache)
    cache.save(path, notes={"tokens": 100})
    adms.disable_adms(model)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if server.stdin is None or server.stdout is None:
        raise RuntimeError("a server without pipes")
    first, last, cut_short = 100, 100, 0
    try:
        for _ in range(KILLS):
            server.stdin.write("save\n")
            server.stdin.flush()
            saver = int(server.stdout.readline())
            time.sleep(chooser.uniform(0.02, 0.25))
            os.kill(saver, signal.SIGKILL)
            # The next answer comes once it is gone, so wait for that by name.
            while _runs(saver):
                time.sleep(0.001)
            cut_short += bool(list(tmp_path.glob(".*.partial")))
            last = whole(path, model, last)
    finally:
        server.stdin.close()
        server.wait(timeout=30)
        server.stdout.close()
    # Saves were made, and some were cut short, or nothing was tried.
    assert last > first and cut_short > 0
    print(f"{KILLS} kills, {last - first} whole saves, {cut_short} kills with a partial file")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def whole(path: Path, model: Any, at_least: int) -> int:
    """Loads; the tokens seen, which never go back."""
    session = load_session(path, model)
    seen = session.cache.tokens_seen
    assert seen >= at_least and session.notes["tokens"] == seen
    adms.disable_adms(model)
    return seen

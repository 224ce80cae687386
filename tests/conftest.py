import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported anywhere
    os.environ.setdefault("TRITON_INTERPRET", "1")
import equiconv  # noqa: F401  (before escnn, which it gives Wigner matrices where lie_learn is missing)


@pytest.fixture
def one_thread():
    """torch on one thread, for tests whose layers are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    """Native code of no wider vectors than those; skips where this CPU has not even them."""
    limit = torch.ops.equiconv.limit_isa
    try:
        if limit(request.param) != request.param:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param
    finally:
        limit("avx512")


@pytest.fixture
def poisoned_memory():
    """torch fills what it allocates with NaN: none is left of it where every output is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def own_escnn_cache(monkeypatch):
    """escnn's cache of sampled bases, empty, for a test that spoils it for the rest of the process."""
    from escnn.nn.modules.basismanager import basisexpansion_singleblock
    monkeypatch.setattr(basisexpansion_singleblock, "_stored_filters", {})


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What tests.distributed_worker wrote on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = []
    for rank in range(2):
        command = [sys.executable, "-W", "ignore", "-m", "tests.distributed_worker", str(rank), "2", folder]
        environment = {**os.environ, "PYTHONHASHSEED": str(rank + 1), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, error = process.communicate(timeout=180)
        assert process.returncode == 0, error
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert results[0]["seed"] != results[1]["seed"]
    return results

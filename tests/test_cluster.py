"""Jobs on other machines: two simulated nodes, with lost workers, nodes and drivers."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bort import cluster, jobs
from bort.cluster import Cluster, ClusterSettings, WorkerKilledError
from bort.errors import UserError
from bort.files import lock_folder
from bort.jobs import Caps, OverMemoryError, OverTimeError, ProcessDiedError
from tests.conftest import ROOT
from tests.job_functions import (
    bug,
    end,
    kill_itself,
    save_at_sigterm,
    take_memory,
    unpicklable_error,
    user_mistake,
    write_pid_and_sleep,
)
from tests.nodes import Nodes, wait_until
from tests.test_jobs import gone, wait_for


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    pytest.importorskip("distributed")
    with Nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


@pytest.fixture
def folder(tmp_path):
    with lock_folder(str(tmp_path / "output")):
        yield tmp_path / "output"


def seen(number):
    """Return what a job finds: its process, that of its worker, threads, slot, folder."""
    time.sleep(0.5)
    threads = os.environ["OMP_NUM_THREADS"]
    return number, os.getpid(), os.getppid(), threads, jobs.slot(), os.getcwd()


def square(number):
    return number * number


def multiply(factors, number):
    return float(factors.sum()) * number


def slow_first(path, number):
    if number == 0:
        write_pid_and_sleep(path, 600)
    return number


def kill_worker(number):
    """Kill the worker of the job, when it is number 1."""
    if number == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return number


# ---- without a cluster ---------------------------------------------------------------------------


def test_without_the_package_the_flag_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    ClusterSettings().check()
    with pytest.raises(UserError, match=r"pip install -r requirements-cluster\.txt"):
        ClusterSettings("tcp://here:8786").check()
    monkeypatch.setattr(
        cluster.importlib.util, "find_spec", lambda name: None if "queue" in name else name
    )
    ClusterSettings("tcp://here:8786").check()
    with pytest.raises(UserError, match="the package dask-jobqueue is not installed"):
        ClusterSettings("slurm:queue.yaml").check()


@pytest.mark.parametrize("given", ["slurm", "pbs:"])
def test_a_queue_without_its_file_is_named(given):
    with pytest.raises(UserError, match=rf"^--cluster {given}: names no file of the queue"):
        ClusterSettings(given).check()


def test_machines_with_other_versions_are_named():
    def versions(**packages):
        return {
            "packages": {"python": "3.11.7", "distributed": "1", "cloudpickle": "3", **packages}
        }

    same = {"client": versions(), "scheduler": versions(), "workers": {"tcp://a:1": versions()}}
    cluster.compare_versions("tcp://s:1", same)
    for name, other in (
        ("the scheduler tcp://s:1 has python 3.9.1", {"scheduler": versions(python="3.9.1")}),
        ("tcp://b:1 has distributed 2", {"workers": {"tcp://b:1": versions(distributed="2")}}),
    ):
        with pytest.raises(UserError, match=f"{name}, this machine .*; install the same versions"):
            cluster.compare_versions("tcp://s:1", {**same, **other})


@pytest.mark.parametrize("package", ["numpy", "tokenizers", "sentencepiece", "tiktoken"])
def test_a_worker_with_another_package_is_refused(tmp_path, package):
    """Those that tokenize may give other ids to the same text."""
    job = cluster.Job(
        *(b"", "", "", b"", str(tmp_path), str(tmp_path)),
        *({**cluster.environment(), package: "0.0"}, 1, jobs.UNLIMITED, 0.0),
    )
    with pytest.raises(UserError, match=rf"has {package} \S+, the driver 0\.0; install the same"):
        cluster._check_machine(job)


# ---- jobs ----------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_a_job_has_a_process_with_its_own_environment(nodes, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Cluster(nodes.address, folder, threads=2) as executor:
        assert executor.workers == 2
        found = sorted(executor.as_completed(seen, range(4)))
    assert [number for number, *_ in found] == [0, 1, 2, 3]
    processes = {pid for _, pid, *_ in found}
    assert len(processes) == 4
    workers = {*nodes.workers(0), *nodes.workers(1)}
    assert {parent for _, _, parent, *_ in found} == workers
    assert not processes & workers
    assert {each[3:] for each in found} == {("2", (0, 1), str(tmp_path))}


@pytest.mark.cluster
def test_threads_are_the_users_or_the_workers_share(nodes, folder, monkeypatch):
    for asked, expected in ((5, "5"), (None, str(jobs.usable_cores()))):
        monkeypatch.setattr(cluster, "_USERS_THREADS", asked)
        with Cluster(nodes.file, folder) as executor:
            assert executor.submit(seen, 0).result()[3] == expected


@pytest.mark.cluster
def test_errors_reach_the_caller(nodes, folder):
    with Cluster(nodes.address, folder) as executor:
        with pytest.raises(UserError, match=r"^file: wrong; fix it$"):
            executor.submit(user_mistake).result()
        with pytest.raises(KeyError, match="not the user's"):
            executor.submit(bug).result()
        with pytest.raises(RuntimeError, match="TwoArgumentsError: 1 and 2"):
            executor.submit(unpicklable_error).result()
        with pytest.raises(ProcessDiedError, match="was killed"):
            executor.submit(kill_itself).result()
        with pytest.raises(ProcessDiedError, match="ended with status 3"):
            executor.submit(partial(end, 3)).result()


@pytest.mark.cluster
def test_caps_hold(nodes, folder, tmp_path):
    over_time = pytest.raises(OverTimeError)
    with Cluster(nodes.address, folder, caps=Caps(seconds=2.0)) as executor, over_time as over:
        executor.submit(write_pid_and_sleep, tmp_path / "pid").result()
    assert 2 < over.value.seconds < 50  # of 60, on a busy machine too
    assert gone((tmp_path / "pid").read_text())
    with Cluster(nodes.address, folder, caps=Caps(megabytes=200)) as executor:
        with pytest.raises(OverMemoryError):
            executor.submit(take_memory, 300, 60).result()
        assert executor.submit(take_memory, 1, 0).result() == 1


@pytest.mark.cluster
def test_large_functions_go_to_the_shared_disk_once(nodes, folder):
    factors = np.ones(100_000)
    executor = Cluster(nodes.address, folder)
    with executor:
        results = executor.as_completed(partial(multiply, factors), range(3))
        first = next(results)
        files = [path for path in folder.iterdir() if path.name.startswith(".function.")]
        assert [path.stat().st_size > factors.nbytes for path in files] == [True]
        assert sorted([first, *results]) == [0, 1e5, 2e5]
        damaged = executor.submit(partial(multiply, factors + 1), 1)
        files = [path for path in folder.iterdir() if path.name.startswith(".function.")]
        assert damaged.result() == 2e5
        files[0].write_bytes(b"another pickle")
        with pytest.raises(UserError, match="is not what the driver wrote"):
            executor.submit(executor._last[0], 1).result()
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.cluster
def test_a_slow_job_holds_up_no_other_and_items_are_read_when_needed(nodes, folder, tmp_path):
    read = []

    def items():
        for number in range(6):
            read.append(number)
            yield number

    with Cluster(nodes.address, folder) as executor:
        results = executor.as_completed(partial(slow_first, tmp_path / "pid"), items())
        assert next(results) == 1
        assert len(read) <= 3
        assert [next(results) for _ in range(4)] == [2, 3, 4, 5]
        pid = (tmp_path / "pid").read_text()
        assert not gone(pid, 0.5)
    assert gone(pid)


@pytest.mark.cluster
def test_a_node_that_joins_gets_jobs(tmp_path, folder):
    pytest.importorskip("distributed")
    with Nodes(tmp_path / "nodes", count=0) as made, Cluster(made.address, folder) as executor:
        assert executor.workers == 1  # while there are none
        results = executor.as_completed(partial(slow_first, tmp_path / "pid"), range(3))
        made.start_node()
        made.add()
        assert [next(results), next(results)] == [1, 2]


@pytest.mark.cluster
def test_gpus_are_a_resource_of_workers(tmp_path, folder, capsys):
    pytest.importorskip("distributed")
    with Nodes(tmp_path / "nodes", count=0) as made:
        made.add()
        with Cluster(made.address, folder, gpus="0") as executor:
            assert executor.workers == 1
            assert "has no workers with the resource GPU=1; waiting" in capsys.readouterr().err
            job = executor.submit(visible_gpu)
            made.add("--resources", "GPU=1", CUDA_VISIBLE_DEVICES="7")
            assert job.result() == ("7", made.workers(1)[0])


def visible_gpu():
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.getppid()


# ---- what is lost --------------------------------------------------------------------------------


@pytest.mark.cluster
def test_jobs_of_lost_workers_and_nodes_run_again(tmp_path, folder):
    pytest.importorskip("distributed")
    with Nodes(tmp_path / "nodes", count=3) as made, Cluster(made.address, folder) as executor:
        running = [executor.submit(log_and_wait, tmp_path, number) for number in range(3)]
        wait_until(lambda: len(list(tmp_path.glob("job*"))) == 3)
        first = made.jobs()
        assert len(first) == 3
        os.kill(made.workers(0)[0], signal.SIGKILL)
        made.kill(1)
        wait_until(lambda: len(list(tmp_path.glob("job*"))) == 4)
        (tmp_path / "go").touch()
        assert [future.result() for future in running] == [0, 1, 2]
    assert all(gone(pid) for pid in first)


def log_and_wait(folder, number):
    Path(folder, f"job{number}-{os.getpid()}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.05)
    return number


@pytest.mark.cluster
def test_a_job_that_kills_its_workers_is_named_and_the_others_finish(tmp_path, folder):
    pytest.importorskip("distributed")
    options = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    with Nodes(tmp_path / "nodes", **options) as made, Cluster(made.address, folder) as executor:
        results = executor.as_completed(kill_worker, range(4))
        assert sorted([next(results), next(results), next(results)]) == [0, 2, 3]
        with pytest.raises(WorkerKilledError, match="2 workers that ran the job 1 died with it"):
            next(results)


@pytest.mark.cluster
def test_jobs_end_with_the_context_after_saving(nodes, folder, tmp_path):
    with Cluster(nodes.address, folder, patience=60) as executor:
        executor.submit(save_at_sigterm, tmp_path / "saved", tmp_path / "started")
        pid = wait_for(tmp_path / "started")
    assert (tmp_path / "saved").read_text() == "saved"
    assert gone(pid, 0.5)
    with Cluster(nodes.address, folder) as executor:
        executor.submit(write_pid_and_sleep, tmp_path / "pid")
        pid = wait_for(tmp_path / "pid")
    assert gone(pid, 0.5)


DRIVER = """
import sys
from bort.cluster import Cluster
from bort.files import lock_folder
from tests.job_functions import write_pid_and_sleep
address, folder, path = sys.argv[1:]
with lock_folder(folder), Cluster(address, folder) as executor:
    executor.submit(write_pid_and_sleep, path).result()
"""


@pytest.mark.cluster
def test_jobs_end_with_a_killed_driver(nodes, tmp_path):
    command = [sys.executable, "-c", DRIVER, nodes.address, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = tmp_path / "pid"
    with subprocess.Popen([*command, str(path)], cwd=ROOT, env=environment) as driver:
        pid = wait_for(path)
        driver.kill()
    assert gone(pid)


@pytest.mark.cluster
def test_a_lost_scheduler_is_reported(tmp_path, folder, monkeypatch, capfd):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 5.0)
    options = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2s"}
    with Nodes(tmp_path / "nodes", count=1, **options) as made:
        with Cluster(made.address, folder) as executor:
            running = executor.submit(write_pid_and_sleep, tmp_path / "pid")
            pid = wait_for(tmp_path / "pid")
            made.scheduler.kill()
            made.scheduler.wait()
            named = partial(pytest.raises, UserError, match="scheduler was lost; rerun the same")
            executor._counted = -float("inf")
            with named():  # while the client tries to reconnect
                assert executor.workers
            with named():
                running.result(60)
            wait_until(lambda: executor._client.status == "closed")
            with named():
                executor.submit(abs, -1)
            with named():
                assert executor.workers
        assert gone(pid, 30)
    assert capfd.readouterr().err == ""


# ---- who is refused ------------------------------------------------------------------------------


def test_an_address_without_a_scheduler_is_refused(tmp_path, folder, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.2)
    other = tmp_path / "other.json"
    other.write_text('{"type": "Scheduler"}')
    for address, message in (
        ("tcp://localhost:1", "tcp://localhost:1: cannot be reached"),
        (str(tmp_path / "none.json"), "no such file; start a scheduler first"),
        (str(other), "other.json: has no address of a scheduler; name the scheduler.json that"),
        ("tcp://localhost", "is none of tcp://host:8786"),
        ("tls://", "is none of tcp://host:8786"),
        ("ssh://localhost", "is none of tcp://host:8786"),
        ("localhost:8786", "is none of tcp://host:8786"),
    ):
        with pytest.raises(UserError, match=message):
            Cluster(address, folder)


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"])
def test_another_server_is_no_scheduler(folder, capfd, monkeypatch, greeting):
    """Nothing is left to Dask's destructor of a client, which waits for 40 s."""
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1.0)

    class Greeting(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(greeting)
            while self.request.recv(1000):
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = "tcp://127.0.0.1:{1}".format(*server.server_address)
        begin = time.monotonic()
        with pytest.raises(UserError, match=f"^--cluster {address}: no Dask scheduler answers"):
            Cluster(address, folder)
        gc.collect()
        server.shutdown()
    assert time.monotonic() - begin < 30
    assert capfd.readouterr().err == ""


@pytest.mark.cluster
def test_a_worker_with_other_code_is_refused(tmp_path, folder):
    pytest.importorskip("distributed")
    other = tmp_path / "other"
    for package in ("bort", "data"):
        (other / package).mkdir(parents=True)
        for path in ROOT.glob(f"{package}/**/*.py"):
            copy = other / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (other / "data" / "masking.py").write_text("# another version\n")
    with Nodes(tmp_path / "nodes", count=0) as made:
        made.add(PYTHONPATH=str(other))
        refused = pytest.raises(
            UserError, match=r"the worker on .* has this project .*, the driver"
        )
        with Cluster(made.address, folder) as executor, refused:
            executor.submit(square, 2).result()


@pytest.mark.cluster
def test_a_machine_that_does_not_share_the_folder_is_refused(nodes, tmp_path):
    refused = pytest.raises(UserError, match=r"does not see .*not there/\.lock of the driver")
    with Cluster(nodes.address, tmp_path / "not there") as executor, refused:
        executor.submit(square, 2).result()


# ---- TLS -----------------------------------------------------------------------------------------


def certificate(folder, name):
    """Make a certificate that is its own authority; return its file and that of its key."""
    files = [str(folder / f"{name}.pem"), str(folder / f"{name}-key.pem")]
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    words += ["-subj", f"/CN={name}", "-out", files[0], "-keyout", files[1]]
    subprocess.run(words, check=True, capture_output=True)
    return files


def tls(authority, own):
    """Return the configuration of Dask with certificates."""
    names = ("ca-file", "client.cert", "client.key")
    files = (authority[0], *own)
    return {f"distributed.comm.tls.{name}": file for name, file in zip(names, files)}


@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_connections_without_a_certificate_are_refused(tmp_path, folder, monkeypatch):
    pytest.importorskip("distributed")
    import dask

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 5)
    good, other = certificate(tmp_path, "good"), certificate(tmp_path, "other")
    prefix = "DASK_DISTRIBUTED__COMM__TLS__"  # as scripts/README.md has it
    variables = {f"{prefix}CA_FILE": good[0]}
    for role in ("SCHEDULER", "WORKER"):
        variables[f"{prefix}{role}__CERT"], variables[f"{prefix}{role}__KEY"] = good
    with Nodes(tmp_path / "nodes", count=1, protocol="tls", **variables) as made:
        assert made.address.startswith("tls://")
        with dask.config.set(tls(good, good)), Cluster(made.address, folder) as executor:
            assert executor.submit(square, 3).result() == 9
        with dask.config.set(tls(good, good)), Cluster(made.file, folder) as executor:
            assert executor.submit(square, 4).result() == 16
        plain = made.address.replace("tls://", "tcp://")
        for address, settings in (
            (made.address, {}),
            (made.address, tls(good, other)),
            (plain, tls(good, good)),
        ):
            with dask.config.set(settings), pytest.raises(UserError) as refused:
                Cluster(address, folder)
            assert "cannot be reached" in str(refused.value)
            assert "\n" not in str(refused.value)
            print(refused.value)

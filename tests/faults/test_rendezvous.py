"""Processes that do not fit together are told so before JAX starts; what schedulers say about them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest
import runs

from jaxtrain.distributed.cluster import ProcessInfo, detect_process, first_host
from jaxtrain.distributed.rendezvous import rendezvous
from jaxtrain.errors import ConfigError, EnvironmentMismatchError

FINGERPRINT = {"versions": {"jax": "0.10.2"}, "config": {"config.optim.learning_rate": 0.1, "config.seed": 0}}


def rendezvous_of_all(fingerprints, timeout, processes=0):
    """What each of them was told."""
    port = runs.free_port()
    joining = [
        ProcessInfo(f"127.0.0.1:{port}", processes or len(fingerprints), index) for index in range(len(fingerprints))
    ]

    def one(pair):
        try:
            return rendezvous(pair[0], pair[1], timeout)
        except EnvironmentMismatchError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(joining)) as pool:
        return list(pool.map(one, zip(joining, fingerprints, strict=True)))


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("config", {"config.optim.learning_rate": 0.3}, "config.optim.learning_rate is 0.3 there and 0.1 on process 0"),
        ("config", {"config.data.global_batch": 8}, "config.data.global_batch is 8 there and None on process 0"),
        ("versions", {"jax": "0.9.2"}, "jax is '0.9.2' there and '0.10.2' on process 0"),
    ],
)
def test_what_differs_is_named_on_every_process(section, change, said):
    other = FINGERPRINT | {section: FINGERPRINT[section] | change}
    answers = rendezvous_of_all([FINGERPRINT, FINGERPRINT, other], timeout=6)
    assert all(said in answer and f"another {section}" in answer for answer in (answers[0], answers[2]))


def test_silent_and_slow_connections_keep_nobody_waiting():
    port = runs.free_port()
    joining = [ProcessInfo(f"127.0.0.1:{port}", 3, index) for index in range(3)]
    handshake = json.dumps({"index": 2, "processes": 3, "host": "h", "fingerprint": FINGERPRINT}).encode()
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(3) as pool:
        zero = pool.submit(rendezvous, joining[0], FINGERPRINT, 60)
        visitors = [stack.enter_context(connect(port)) for _ in range(6)]
        visitors[0].sendall(b"GET / HTTP/1.1\r\n")
        visitors[-1].sendall(handshake[:20])  # a process, on a slow network
        visitors.pop(1).close()  # gone again
        one = pool.submit(rendezvous, joining[1], FINGERPRINT, 60)
        time.sleep(0.3)
        visitors[-1].sendall(handshake[20:] + b"\n")
        assert zero.result(timeout=50) == f"127.0.0.1:{port}"
        with socket.create_server(("127.0.0.1", port)):  # as JAX would
            assert one.result(timeout=50) == f"127.0.0.1:{port}"
        assert json.loads(visitors[-1].makefile().readlines()[-1]) == {"port": port}


def test_more_connections_than_select_can_watch():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1500:
        pytest.skip("the limit of open files is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500), hard))
    try:
        with contextlib.ExitStack() as stack:
            while stack.enter_context(open(os.devnull)).fileno() < 1100:
                pass
            answers = rendezvous_of_all([FINGERPRINT] * 2, processes=3, timeout=5)
        assert all("process 2 of 3 did not come" in answer for answer in answers)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


MINE = {"index": 1, "processes": 2, "host": "h", "fingerprint": FINGERPRINT, "clock": 0.0}
NO_HANDSHAKES = [
    *(MINE | {"index": index} for index in ([1], {}, 7, -1, "1", 1.0, True, None)),
    *(MINE | {"clock": clock} for clock in ("x", None, float("nan"), float("inf"), [])),
    *(MINE | {"fingerprint": found} for found in (None, [], 3, {"versions": [], "config": 3})),
    MINE | {"host": 3}, MINE | {"jobs": 5}, MINE | {"jobs": [1]}, MINE | {"more": 1}, {}, None, [1], 5,
]  # fmt: skip
NO_LINES = [b"[" * 60_000, b"1" * 60_000, b'{"index":' * 30_000, b"\xff\xfe", b"GET / HTTP/1.1", b"x" * (2 << 20)]


def test_strangers_at_the_port_of_process_zero_are_dropped():
    """What is no handshake, a process that is gone again, and 1,500 connections that say nothing."""
    lines = [json.dumps(each).encode() for each in NO_HANDSHAKES] + NO_LINES
    gone = json.dumps(MINE | {"clock": time.time()}).encode()
    port = runs.free_port()
    joining = [ProcessInfo(f"127.0.0.1:{port}", 2, index) for index in range(2)]
    script = f"""
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held = [socket.create_connection(("127.0.0.1", {port})) for _ in range(1500)]
print(flush=True)
sys.stdin.read()
"""
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(2) as pool:
        zero = pool.submit(rendezvous, joining[0], FINGERPRINT, 60)
        for line in lines:
            with contextlib.suppress(OSError):  # it hung up before the end
                stack.enter_context(connect(port)).sendall(line + b"\n")
        silent = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        assert silent.stdout is not None
        silent.stdout.readline()
        with connect(port) as connection:
            connection.sendall(gone + b"\n")
        one = pool.submit(rendezvous, joining[1], FINGERPRINT, 60)
        assert zero.result(timeout=50) == f"127.0.0.1:{port}"
        with socket.create_server(("127.0.0.1", port)):  # as JAX would
            assert one.result(timeout=50) == f"127.0.0.1:{port}"
        silent.communicate()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": FINGERPRINT | {"config": {"--workdir": "b"}}}, "--workdir is 'b' there and None on process 0"),
        ({"jobs": ["SLURM_JOB_ID=8"]}, "SLURM_JOB_ID=8 there and SLURM_JOB_ID=7 on process 0"),
    ],
)
def test_a_process_of_another_run_is_turned_away_and_the_others_meet(monkeypatch, change, said):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    port = runs.free_port()
    joining = [ProcessInfo(f"127.0.0.1:{port}", 2, index) for index in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        zero = pool.submit(rendezvous, joining[0], FINGERPRINT, 60)
        with connect(port) as connection:
            connection.sendall(json.dumps(MINE | {"clock": time.time()} | change).encode() + b"\n")
            answer = json.loads(connection.makefile().readlines()[-1])
        assert "process 1 on h belongs to another run" in answer["refused"]
        assert said in answer["refused"]
        one = pool.submit(rendezvous, joining[1], FINGERPRINT, 60)
        assert zero.result(timeout=50) == f"127.0.0.1:{port}"
        with socket.create_server(("127.0.0.1", port)):
            assert one.result(timeout=50) == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *((answer, "cannot reach the coordinator") for answer in ("[]", "5", "{}", '{"port": "x"}', '{"refused": 5}')),
        ("[" * 60_000, "cannot reach the coordinator"),
        (r'{"refused": "\u001b[2J pwned\nroot# "}', r"\x1b[2J pwned\nroot# "),
    ],
)
def test_a_stranger_at_the_coordinators_address_is_none(answer, said):
    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"jaxtrain-rendezvous\n")
                    connection.recv(1 << 16)
                    connection.sendall(answer.encode() + b"\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        process = ProcessInfo(f"127.0.0.1:{server.getsockname()[1]}", 2, 1)
        with pytest.raises(EnvironmentMismatchError) as told:
            rendezvous(process, FINGERPRINT, 0.2)
        assert said in str(told.value)
        server.shutdown(socket.SHUT_RDWR)


def test_missing_joiningare_named():
    (answer,) = rendezvous_of_all([FINGERPRINT], processes=3, timeout=1)
    assert "process 1, 2 of 3 did not come" in answer


# ------------------------------------------------------------------------------------------------------------ schedulers

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_STEP_NODELIST": "gpu[003-004,7],cpu1",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,192.168.1.5:34911",
}  # fmt: skip
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("environment", "host", "processes", "index", "source"),
    [
        (SLURM, "gpu003", 8, 5, "Slurm"),
        (OPENMPI, "10.96.0.1", 4, 3, "OpenMPI"),
        (TORCHRUN, "node0:29500", 2, 1, "RANK and WORLD_SIZE"),
        (
            INDEXED | {"JAXTRAIN_COORDINATOR": "job-0.svc:1234", "JAXTRAIN_NUM_PROCESSES": "4"},
            "job-0.svc:1234", 4, 2, "the flags",
        ),
        (SLURM | {"JAXTRAIN_COORDINATOR": "10.0.0.9:99"}, "10.0.0.9:99", 8, 5, "Slurm"),
    ],
    ids=["slurm", "openmpi", "torchrun", "kubernetes", "slurm-with-address"],
)  # fmt: skip
def test_a_scheduler_is_found(environment, host, processes, index, source):
    process = detect_process(environment=environment)
    assert process is not None
    assert (process.processes, process.index, process.source) == (processes, index, source)
    assert process.coordinator.startswith(host)
    assert 0 < process.address[1] < 65536
    others = environment | {"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "0", "RANK": "0", "JOB_COMPLETION_INDEX": "0"}
    assert dataclasses.replace(process, index=0) == detect_process(environment=others), "all agree on the address"


@pytest.mark.parametrize(
    "environment", [{}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_JOB_ID": "1"}, {"WORLD_SIZE": "1"}]
)
def test_a_run_of_one_process(environment):
    assert detect_process(environment=environment) is None


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "Slurm gave this job 4 tasks and the command was started once"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OpenMPI started 2 processes and does not say"),
        ({"WORLD_SIZE": "4", "RANK": "1"}, "MASTER_ADDR or MASTER_PORT is not set"),
        (INDEXED, "JAXTRAIN_COORDINATOR and JAXTRAIN_NUM_PROCESSES are not"),
        (SLURM | {"SLURM_PROCID": "five"}, "SLURM_PROCID is 'five' and must be a whole number"),
        ({"JAXTRAIN_NUM_PROCESSES": "2"}, "go together"),
        (SLURM | {"JAXTRAIN_COORDINATOR": "here"}, "'here': must be HOST:PORT"),
    ],
)
def test_nobody_trains_alone_by_mistake(environment, said):
    with pytest.raises((ConfigError, EnvironmentMismatchError), match=said):
        detect_process(environment=environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[3-7]", "gpu3"),
        ("a[01,5]-b[2-3],c", "a01-b2"),
        ("login-1.site.org,x", "login-1.site.org"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first

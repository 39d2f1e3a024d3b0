"""Two machines, of which one is cut off: network namespaces with a link between them that is taken down."""

import os
import shutil
import subprocess
import time

import pytest

from harness import command, flags, logged, permitted, until
from runs import assert_same_run, torchrun_command

SAVING = ("--save_ckpt_steps", 2)
ADDRESSES = "10.77.0.1", "10.77.0.2"  # within the namespaces; nothing leads out of them


needs_network = pytest.mark.skipif(
    not permitted("--net") or shutil.which("ip") is None,
    reason="needs root with the right to network namespaces, and ip",
)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """The names of two network namespaces that are linked with each other and with nothing else."""
    names = [f"faults-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def cut_off(nodes, processes, folder, *, timeout):
    """Take the link down after some steps, and up again when both have ended. Returns the exit codes and how long."""
    until(lambda: logged(folder) >= 5 or any(p.poll() is not None for p in processes), what="a step")
    ip("-n", nodes[1], "link", "set", "cable", "down")
    start = time.monotonic()
    codes = [process.wait(seconds=10 * timeout + 60) for process in processes]
    seconds = time.monotonic() - start
    ip("-n", nodes[1], "link", "set", "cable", "up")
    return codes, seconds


@needs_network
def test_a_node_cut_off(server, data, undisturbed, nodes, tmp_path, report):
    folder, timeout = tmp_path / "run", 5
    run = flags(data, folder, *SAVING, "--auto_resume", "true", "--dist_timeout", timeout)

    def start():
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "cable"}
        return [
            server.start(*run, env={**launch, "RANK": str(rank), "LOCAL_RANK": "0"}, network=nodes[rank])
            for rank in range(2)
        ]

    ranks = start()
    codes, seconds = cut_off(nodes, ranks, folder, timeout=timeout)
    assert codes == [1, 1]
    for process in ranks:
        assert "another process of the run has ended or cannot be reached" in process.error()
    for process in start():
        assert process.wait() == 0, process.output
    assert_same_run(undisturbed(2), folder)
    report(
        f"2 ranks in networks of their own, the link between them down, `--dist_timeout {timeout}`",
        injected=1,
        lost=f"both end within {seconds:.0f} s, exit code 1; with the link up again they go on to the same end",
        reads=ranks[0].error(),
    )


@needs_network
def test_a_node_of_torchrun_cut_off(data, undisturbed, nodes, tmp_path, thorough, report):
    if not thorough:
        pytest.skip("as above with torchrun, which takes longer; by `make faults`")
    folder, timeout = tmp_path / "run", 20
    run = flags(data, folder, *SAVING, "--auto_resume", "true", "--dist_timeout", timeout)

    def node(rank, log):
        launcher = torchrun_command(
            "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", f"--master_addr={ADDRESSES[0]}",
            "--master_port=29500",
        )  # fmt: skip
        line = ["ip", "netns", "exec", nodes[rank], *launcher, *run]
        return command(line, tmp_path / log, env={"GLOO_SOCKET_IFNAME": "cable"})

    with node(0, "first-0") as first, node(1, "first-1") as second:
        codes, seconds = cut_off(nodes, [first, second], folder, timeout=timeout)
        assert codes == [1, 1]
        message = first.line("another process of the run has ended or cannot be reached")
        assert second.line("another process of the run has ended or cannot be reached")
        assert first.alive() == second.alive() == []
    with node(0, "second-0") as first, node(1, "second-1") as second:
        assert [first.wait(), second.wait()] == [0, 0], first.output + second.output
    assert_same_run(undisturbed(2), folder)
    report(
        f"`torchrun --nnodes=2`, a network namespace for each node, the link down, `--dist_timeout {timeout}`",
        injected=1,
        lost=f"both nodes end within {seconds:.0f} s, exit code 1; started again with the link up: the same end",
        reads=message,
    )

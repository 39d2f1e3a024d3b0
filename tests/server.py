"""Starts processes from one that has imported everything already, which takes a tenth of the time.

What it starts is a process as any other: a fork with a session, an environment, limits and files of its own. It leaves
as Python does, but ends before Python takes all modules apart, which takes a third of a second. Requests and answers
are lines of JSON:

    {"target": "main:main", "arguments": [[...]], "cwd": ..., "env": {}, "limits": {}, "network": null,
     "log": FILE} -> pid
    {"poll": pid} -> exit code as `subprocess` gives it, or null while the process runs
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import sys


def serve() -> dict:
    """Answer requests; returns in a new process, with what it is to do."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    os._exit(0)


CLONE_NEWNET = 0x40000000


def enter_network(namespace: str) -> None:
    """Have no network but that of a namespace that `ip netns` made."""
    libc = ctypes.CDLL(None, use_errno=True)
    file = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(file, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace", namespace)
    os.close(file)


def become(request: dict) -> None:
    os.setsid()
    files = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for source, target in ((files[0], 0), (files[1], 1), (files[1], 2)):
        os.dup2(source, target)
    for file in files:
        os.close(file)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for name, value in request["limits"].items():
        number = getattr(resource, name)
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
    if request["network"] is not None:
        enter_network(request["network"])


class Leave:
    """What a process does last, after its threads have ended and all other functions of `atexit`."""

    code = 1  # as after an exception that nothing caught

    def __call__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


if __name__ == "__main__":
    leave = Leave()
    atexit.register(leave)  # the first is called last
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would touch, and so copy, all of this
    print(json.dumps("ready"), flush=True)
    request = serve()
    become(request)
    module, _, function = request["target"].partition(":")
    try:
        getattr(importlib.import_module(module), function)(*request["arguments"])
        leave.code = 0
    except SystemExit as ended:
        leave.code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise

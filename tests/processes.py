"""Code in a process of its own, for what is decided at import."""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from tempfile import NamedTemporaryFile

INTERPRETS = {"TRITON_INTERPRET": "1"}
FORKING = """
import json, os, sys, traceback

import torch  # what takes longest, once for all

for line in sys.stdin:
    code, out, err, folder, environment = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(out, os.O_WRONLY), 1)
        os.dup2(os.open(err, os.O_WRONLY), 2)
        os.chdir(folder)
        os.environ.update(environment)
        status = 1
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def python(code, **env):
    """What the code prints; it imports what the tests do."""
    if env == INTERPRETS:
        return _forked(code)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(env)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment(env):
    return {**os.environ, **env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _forked(code):
    """The same, of a process that begins with torch imported and kernels interpreted."""
    if _server().poll() is not None:  # killed for memory, say
        _server.cache_clear()
    server = _server()
    with NamedTemporaryFile("w+") as out, NamedTemporaryFile("w+") as err:
        asked = code, out.name, err.name, os.getcwd(), _environment(INTERPRETS)
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        assert status == "0", err.read()
        return out.read()


@cache
def _server():
    server = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(INTERPRETS),
    )
    atexit.register(server.kill)
    return server

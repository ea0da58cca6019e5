"""Code in a process of its own, for what is decided at import."""

import os
import subprocess
import sys


def python(code, **env):
    """What the code prints; it imports what the tests do."""
    env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout

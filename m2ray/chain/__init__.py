"""The chain of stages on a Ray cluster, and the main path through it.

Ray reads its authentication settings once, when it is imported. A cluster that m2ray starts for itself has token
authentication on, with a token that never leaves this process and its children, and its processes listen on the loopback interface alone; so
all this is set here, before any module of this package imports Ray. A cluster that RAY_ADDRESS names keeps its own settings.

Two more things are set for the stages on CPUs, here or in Ray's workers. Their computation is what the run is for: it runs as urgently as
whoever started it, not at nice 15 as Ray has it. And a thread of torch's that waits for its neighbours spins for milliseconds, on a core which
the writer and other programs could use: it sleeps sooner.

After a failure nobody asks any more for what the calls in flight gave: Ray is told not to print the trace of each. Nor is it to ask in a
notebook, while it is imported, for ipywidgets, for bars of its own that are not shown.
"""

import logging
import os
import secrets
import sys

if "ray" not in sys.modules and not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's word for machines that are never part of a cluster of several: their node's address is 127.0.0.1.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")

os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
# How long a thread of torch's waits for the others before it sleeps; read when torch is imported. docs/tried.md has the figures.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
logging.getLogger("ray.widgets").setLevel(logging.ERROR)
# Colours of Ray's own lines would be shown as escapes, as all control characters from outside.
os.environ.setdefault("RAY_COLOR_PREFIX", "0")

"""Entry point for `ray job submit`: `m2ray verify` with the same arguments, on a node that sees the run folder."""

import sys

from m2ray.cli import main

main(["verify", *sys.argv[1:]])

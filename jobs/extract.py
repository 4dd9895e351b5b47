"""Entry point for `ray job submit`: `m2ray extract` with the same arguments, where folders must be absolute."""

import sys

from m2ray.cli import main

main(["extract", "--in-job", *sys.argv[1:]])

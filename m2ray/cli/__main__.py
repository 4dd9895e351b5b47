"""`python -m m2ray.cli`, where the console script is not on the path."""

from m2ray.cli import main

main()

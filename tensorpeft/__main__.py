"""``python -m tensorpeft``."""

from tensorpeft.cli import main

main()

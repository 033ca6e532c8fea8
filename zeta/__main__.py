"""``python -m zeta`` is the `zeta` command."""

from zeta.cli import main

main()

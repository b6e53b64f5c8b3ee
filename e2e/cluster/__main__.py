"""The cluster's command line: `up`, `down`, `status`, `load-image ARCHIVE…`."""

import argparse
import sys
import time
from pathlib import Path

from cluster.node import down, find_node, up
from cluster.paths import Paths
from cluster.shell import ClusterError


def main() -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(prog="cluster", description="A real single-node Kubernetes on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="bring it up; nothing where it is up")
    commands.add_parser("down", help="remove it and every trace but the cache")
    commands.add_parser("status", help="say whether it is up; exit 1 where it is not")
    commands.add_parser("load-image", help="import images into it").add_argument("archives", nargs="+", type=Path)
    arguments = parser.parse_args()
    try:
        return _run(arguments)
    except ClusterError as error:
        print(f"cluster {arguments.command}: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "up":
        started = time.monotonic()
        node = up()
        print(f"The cluster is up ({time.monotonic() - started:.1f} s). export KUBECONFIG={node.kubeconfig}")
    elif arguments.command == "down":
        down()
        print("The cluster is gone.")
    elif arguments.command == "status":
        if not Paths.from_environment().kubeconfig.exists() or not find_node().is_up():
            print("The cluster is not up: make cluster")
            return 1
        print(f"The cluster is up. export KUBECONFIG={Paths.from_environment().kubeconfig}")
    else:
        for archive in arguments.archives:
            print("\n".join(find_node().load_image(archive)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

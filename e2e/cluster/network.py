"""What the cluster adds to the machine's network and kernel settings, and its complete removal.

Two bridges: an empty one that carries the node's address (some kernels have no dummy links), and the one that the CNI
plugin makes for pods. Removal needs no record but the saved settings: links go by name, chains by prefix or comment.
"""

import json
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cluster.shell import ClusterError, run

NODE_ADDRESS = "10.99.0.1"
POD_CIDR = "10.244.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
NODE_LINK = "quire-node"
POD_LINK = "quire-pods"
CNI_NETWORK = "quire"

# What kubelet, kube-proxy and the bridge plugin change on a machine.
_SETTINGS = (
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/ip_forward",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
)
_GUARD = "KUBE-QUIRE-GUARD"  # removed with kube-proxy's own chains, for its name begins as theirs do
_TABLES = ("filter", "mangle", "nat")


def create_node_link() -> None:
    """Make the bridge that carries the node's address."""
    run(["ip", "link", "add", NODE_LINK, "type", "bridge"])
    run(["ip", "address", "add", f"{NODE_ADDRESS}/32", "dev", NODE_LINK])
    run(["ip", "link", "set", NODE_LINK, "up"])


def write_cni_config(directory: Path) -> None:
    """Write the configuration of the pods' network."""
    directory.mkdir(parents=True, exist_ok=True)
    bridge = {
        "type": "bridge",
        "bridge": POD_LINK,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": POD_CIDR}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    content = {"cniVersion": "0.4.0", "name": CNI_NETWORK, "plugins": [bridge]}
    (directory / "10-quire.conflist").write_text(json.dumps(content, indent=2))


def refuse_unknown_services() -> None:
    """Refuse packets to addresses of Services that are gone: the default route would lead them out of the machine.

    kube-proxy has rewritten the destination of all others before this chain is reached.
    """
    script = ["*filter", f":{_GUARD} - [0:0]", f"-A {_GUARD} -d {SERVICE_CIDR} -j REJECT"]
    script += [f"-I {chain} -j {_GUARD}" for chain in ("FORWARD", "OUTPUT")]
    run(["iptables-restore", "--noflush", "--wait"], text_input="\n".join([*script, "COMMIT", ""]))


def save_settings(path: Path) -> None:
    """Write the kernel settings that running a node will change."""
    saved = {}
    for name in _SETTINGS:
        with suppress(OSError):
            saved[name] = (Path("/proc/sys") / name).read_text().strip()
    path.write_text(json.dumps(saved))


def restore_settings(path: Path) -> None:
    """Put the kernel settings back, where they were saved."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    for name, value in saved.items():
        with suppress(OSError):
            setting = Path("/proc/sys") / name
            if setting.read_text().strip() != value:
                setting.write_text(value)


def remove_links() -> None:
    """Remove both bridges; pods' links go with their network namespaces."""
    for link in (POD_LINK, NODE_LINK):
        if Path("/sys/class/net", link).exists():
            run(["ip", "link", "delete", link])


def forget_connections() -> None:
    """Drop what the kernel remembers of pods' connections: the next cluster gives the same addresses to others."""
    for direction in ("--orig-src", "--orig-dst", "--reply-src"):
        for cidr in (POD_CIDR, SERVICE_CIDR):
            with suppress(ClusterError):  # status 1 says that there was none
                run(["conntrack", "-D", direction, cidr])


def remove_rules() -> None:
    """Remove the chains and rules of kube-proxy, of kubelet and of the pods' network."""
    for prefix in ("iptables", "ip6tables"):
        for table in _TABLES:
            try:
                rules = run([f"{prefix}-save", "-t", table])
            except ClusterError:
                continue  # a kernel without this table has no rule in it
            changes = plan_removal(rules.splitlines())
            if changes:
                script = "\n".join([f"*{table}", *changes, "COMMIT", ""])
                run([f"{prefix}-restore", "--noflush", "--wait"], text_input=script)


def has_foreign_rules() -> bool:
    """Tell whether kube-proxy's chains exist already."""
    return any(line.startswith(":KUBE-SERVICES ") for line in run(["iptables-save", "-t", "nat"]).splitlines())


def plan_removal(saved_lines: Iterable[str]) -> list[str]:
    """Return the iptables-restore lines that take the cluster's rules and chains out of one saved table."""
    lines = list(saved_lines)
    jumps = [(line, shlex.split(line)) for line in lines if line.startswith("-A ")]
    chains = {line[1:].split()[0] for line in lines if line.startswith(":KUBE-")}
    comment = f'name: "{CNI_NETWORK}" id:'
    chains |= {
        words[words.index("-j") + 1]
        for _, words in jumps
        if "-j" in words and any(word.startswith(comment) for word in words)
    } - {"ACCEPT", "MASQUERADE", "RETURN"}
    into = [f"-D{line[2:]}" for line, words in jumps if words[1] not in chains and chains.intersection(words[2:])]
    ordered = sorted(chains)
    return into + [f"-F {chain}" for chain in ordered] + [f"-X {chain}" for chain in ordered]

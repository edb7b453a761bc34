"""Nodes out of network namespaces: bytes on each link against the planned ones, and the step with and without nodes.

    python -m benchmarks.nodes                           2 nodes of 2 ranks, links of 100 Mbit/s and of 1 Gbit/s
    python -m benchmarks.nodes --nodes 4 --rates 1gbit
    python -m benchmarks.nodes --reduce bfloat16         gradients in 16 bits: in two levels where the nodes are known

Each node is a network namespace, joined to a bridge by a veth pair whose rate `tc tbf` limits in both directions, so
ranks of a node talk at the speed of memory and nodes at that of the link. gloo; needs Linux, iproute2 and the right to
make namespaces (root). The namespaces end with the processes in them.

Two optimizers take turns over the same gradients: one that knows the nodes (`gpus_per_node`), and one that is told that
all ranks share one. For both, the kernel's counter of each link is compared with the bytes that layout and backend say.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distmuon
from benchmarks.setting import Setting, make_gradients, make_trainee
from distmuon.layout.layout import Layout
from distmuon.options import Options, Precision
from distmuon.planning.counts import count
from tests.distributed.loopback import bring_up_loopback

MTU = 9000  # jumbo frames, as between the machines of a cluster; headers are 1 % of them
WAYS: dict[str, Any] = {"nodes known": None, "nodes not known": "all"}


def missing() -> str:
    """Why there can be no nodes here; empty if there can."""
    tools = [tool for tool in ("ip", "tc", "unshare", "nsenter") if not shutil.which(tool)]
    if tools:
        return f"{', '.join(tools)} not found; install iproute2 and util-linux"
    probe = f"ip link add one0 type veth peer name two0 && tc qdisc add dev one0 {' '.join(limit('1gbit'))}"
    made = subprocess.run(["unshare", "-n", "sh", "-c", probe], capture_output=True, text=True)
    return f"the kernel refuses a limited veth pair: {made.stderr.strip()}" if made.returncode else ""


def limit(rate: str) -> tuple[str, ...]:
    """What tc is told for a device; a burst holds four of the kernel's largest packets, so that it cuts none."""
    return "root", "tbf", "rate", rate, "burst", "256kb", "latency", "400ms"


def run(*words: str) -> None:
    subprocess.run(words, check=True)


def make_nodes(number: int, rate: str) -> list[subprocess.Popen[bytes]]:
    """A bridge in this namespace, and `number` namespaces on it; each lives as long as its process."""
    run("ip", "link", "add", "bridge", "mtu", str(MTU), "type", "bridge")
    run("ip", "link", "set", "bridge", "up")
    nodes = []
    for node in range(number):
        holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.01)
        name, inside = f"node{node}", ("nsenter", "-t", str(holder.pid), "-n")
        run(
            "ip", "link", "add", name, "mtu", str(MTU), "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid)
        )
        run(*inside, "ip", "link", "set", "eth0", "mtu", str(MTU))
        run(*inside, "ip", "address", "add", f"10.77.0.{node + 1}/24", "dev", "eth0")
        run(*inside, "ip", "link", "set", "eth0", "up")
        run(*inside, "ip", "link", "set", "lo", "mtu", "65536", "up")  # between the ranks of the node
        run("ip", "link", "set", name, "master", "bridge", "up")
        run(*inside, "tc", "qdisc", "add", "dev", "eth0", *limit(rate))
        run("tc", "qdisc", "add", "dev", name, *limit(rate))
        nodes.append(holder)
    return nodes


def link_bytes() -> int:
    """Bytes that this node has sent through its link."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (fields,) = [line.split(":")[1].split() for line in lines if line.strip().startswith("eth0:")]
    return int(fields[8])


def tree(root: int, dp_size: int) -> Iterator[tuple[int, int]]:
    """(sender, receiver) of each message of gloo's broadcast from `root`: a binomial tree."""
    distance = 1
    while distance < dp_size:
        for sender in range(min(distance, dp_size - distance)):
            yield (root + sender) % dp_size, (root + sender + distance) % dp_size
        distance *= 2


def leaving(layout: Layout, node_size: int, reduce: torch.dtype) -> list[dict[str, int]]:
    """By rank and stage, the bytes that exchanges and 16-bit reductions send to other nodes."""
    ranks, _ = count(layout, Options(precision=Precision(reduce=reduce)), node_size=node_size)
    return [rank.sent_between_nodes for rank in ranks]


def planned(layout: Layout, node_size: int, reduce: torch.dtype) -> list[int]:
    """The bytes that each node sends in a step on gloo: reduce-scatters, exchanges, all-gathers; see group.py."""
    dp_size = layout.dp_size
    found = [0] * (dp_size // node_size)
    for rank, sent in enumerate(leaving(layout, node_size, reduce)):
        found[rank // node_size] += sum(sent.values())
    for bucket in layout.buckets:
        for rank in range(dp_size):
            if reduce == torch.float32:  # to every rank of the other nodes
                found[rank // node_size] += (dp_size - node_size) * bucket.shard_size * 4
            for sender, receiver in tree(rank, dp_size):
                if sender // node_size != receiver // node_size:
                    found[sender // node_size] += bucket.shard_size * bucket.dtype.itemsize
    return found


def work(arguments: argparse.Namespace) -> None:
    """One rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, per_node, reduce = int(os.environ["RANK"]), arguments.ranks, getattr(torch, arguments.reduce)
    dist.init_process_group("gloo", os.environ["BENCH_RENDEZVOUS"], rank=rank, world_size=arguments.nodes * per_node)
    setting = Setting(d_model=arguments.d_model, layers=arguments.layers, vocabulary=512, seq_len=64)
    trainees = {way: make_trainee(setting, torch.device("cpu")) for way in WAYS}
    optimizers = {
        way: distmuon.DistMuon(trainees[way], gpus_per_node=per_node if given is None else given, reduce_dtype=reduce)
        for way, given in WAYS.items()
    }
    gradients = make_gradients(trainees["nodes known"], rank)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    links: dict[str, list[int]] = {}
    for number in range(arguments.rounds + 1):  # the first builds and connects
        for way, optimizer in optimizers.items():
            loss = trainees[way](torch.zeros(()), {fqn: grad.clone() for fqn, grad in gradients.items()})
            dist.barrier()
            before = link_bytes()
            dist.barrier()  # or else a neighbour's first bytes would be missed
            start = time.perf_counter()
            loss.backward()
            optimizer.step()
            optimizer.synchronize()
            seconds[way].append(time.perf_counter() - start)
            dist.barrier()
            by_rank: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(by_rank, link_bytes() - before)
            if number:
                links.setdefault(way, []).append(by_rank[::per_node])  # type: ignore[arg-type]
    if rank == 0:
        found = {}
        for way, optimizer in optimizers.items():
            expected = planned(optimizer.layout, per_node, reduce)
            far = leaving(optimizer.layout, per_node, reduce)
            sent = [statistics.median(node) for node in zip(*links[way])]
            found[way] = {
                "ms": [1e3 * s for s in statistics.quantiles(seconds[way][1:], n=4, method="inclusive")],
                "sent": sent,
                "planned": expected,
                "exchange": sum(sent.get(stage, 0) for sent in far for stage in ("dp_gather", "scatter")),
            }
        print(json.dumps(found), flush=True)
    for optimizer in optimizers.values():
        optimizer.release()
    dist.barrier()
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace, rate: str, argv: list[str]) -> dict[str, Any]:
    """One rate, in fresh namespaces."""
    command = ["unshare", "-n", sys.executable, "-m", "benchmarks.nodes", *argv, "--stage", "bridge", "--rates", rate]
    bridge = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=arguments.minutes * 60)
    if bridge.returncode:
        raise SystemExit(f"benchmarks.nodes: a rank failed at {rate}")
    found: dict[str, Any] = json.loads(bridge.stdout.strip().splitlines()[-1])
    return found


def start_ranks(arguments: argparse.Namespace, argv: list[str]) -> int:
    """In the namespace of the bridge: make the nodes, start their ranks, wait for them."""
    bring_up_loopback()
    nodes = make_nodes(arguments.nodes, arguments.rates)
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "BENCH_RENDEZVOUS": f"file://{folder}/rendezvous",
        }
        for rank in range(arguments.nodes * arguments.ranks):
            inside = ["nsenter", "-t", str(nodes[rank // arguments.ranks].pid), "-n", sys.executable, "-m"]
            command = [*inside, "benchmarks.nodes", *argv, "--stage", "rank"]
            workers.append(subprocess.Popen(command, env={**shared, "RANK": str(rank)}))
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):  # one failed: the others would wait for it
                for worker in workers:
                    worker.kill()
            time.sleep(0.1)
        for node in nodes:
            node.kill()
    return next((worker.returncode for worker in workers if worker.returncode), 0)


def table(found: dict[str, dict[str, Any]], nodes: int, ranks: int) -> str:
    """Markdown; MB a step over the link of the node that sends most."""
    lines = [
        f"| {nodes} nodes of {ranks}, links | layout | sync + step, ms: median (quartiles) | MB on a link | / planned "
        "| exchanges between nodes, MB |",
        "|---|---|---|---|---|---|",
    ]
    for rate, ways in found.items():
        for way, row in ways.items():
            low, median, high = row["ms"]
            ratio = max(sent / expected for sent, expected in zip(row["sent"], row["planned"]))
            lines.append(
                f"| {rate} | {way} | {median:.0f} ({low:.0f}-{high:.0f}) | {max(row['sent']) / 1e6:.2f} | {ratio:.4f} "
                f"| {row['exchange'] / 1e6:.2f} |"
            )
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="of each node")
    parser.add_argument("--rates", default="100mbit,1gbit", help="of the links, as tc writes them; comma-separated")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1, help="few: matrices must be cut for nodes to matter")
    parser.add_argument("--reduce", choices=("float32", "bfloat16"), default="float32", help="dtype of the reduction")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=10.0, help="for each rate")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", choices=("outside", "bridge", "rank"), default="outside", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.stage == "rank":
        work(arguments)
    elif arguments.stage == "bridge":
        raise SystemExit(start_ranks(arguments, argv))
    elif why_not := missing():
        print(f"benchmarks.nodes: not run: {why_not}", file=sys.stderr)
    else:
        found = {rate: measure(arguments, rate, argv) for rate in arguments.rates.split(",")}
        print(json.dumps(found) if arguments.json else table(found, arguments.nodes, arguments.ranks))


if __name__ == "__main__":
    main()

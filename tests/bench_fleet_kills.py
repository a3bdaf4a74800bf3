"""Two hundred stub experiments on eight workers of a cluster of four nodes, while workers and the agent are killed at random.

`python tests/bench_fleet_kills.py [KILLS]`: kill -9 of the agent so often (10), of up to three workers in each start, of one node near the end.
At the end journal, refs, branch, results.tsv and folders agree, nothing that was acknowledged is lost or changed, no experiment was
run twice under two numbers, and each keep was lower than the incumbent of its moment.
"""

import os
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil
from conftest import NIGHT, check_agreement, make_checkout, rows_of

EXPERIMENTS, NODES, CORES = 200, 4, 2


def workers() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("ray::Worker")]


def main() -> None:
    kills, draw, dead = int(sys.argv[1]) if len(sys.argv) > 1 else 10, random.Random(1), 0
    with tempfile.TemporaryDirectory() as name:
        checkout = make_checkout(Path(name) / "checkout", Path(name) / "cache", stub=True)
        os.environ |= {"AUTORESEARCH_CACHE": str(checkout.cache), "RAY_USAGE_STATS_ENABLED": "0"}
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CORES, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=CORES) for _ in range(NODES - 1)]
        flags = (*NIGHT, "--workers", str(NODES * CORES), "--experiments", str(EXPERIMENTS))
        acknowledged, start = [], time.perf_counter()
        for kill in range(kills + 1):
            process = checkout.start(*flags, RAY_ADDRESS=cluster.address)
            lost, target = 0, len(acknowledged) + draw.randint(8, EXPERIMENTS // (kills + 1) + 6)
            while process.poll() is None:
                done = len(rows_of(checkout, "result"))
                if kill < kills and done >= target:
                    break
                if done > len(acknowledged) + 2 and lost < 3 and draw.random() < 0.02 and (own := workers()):
                    draw.choice(own).kill()
                    dead, lost = dead + 1, lost + 1
                if kill == kills and len(nodes) == NODES - 1 and done > EXPERIMENTS - 20:
                    cluster.remove_node(nodes.pop(), allow_graceful=False)
                time.sleep(0.05)
            process.kill()
            output, _ = process.communicate(timeout=60)
            results = rows_of(checkout, "result")
            assert results[: len(acknowledged)] == acknowledged, output
            acknowledged = results
            print(f"start {kill + 1}: {len(results)} results, {dead} workers killed so far", flush=True)
        assert len(acknowledged) == EXPERIMENTS + 1, output
        check_agreement(checkout)
        for name in ("fingerprint", "proposal"):
            assert len({row[name] for row in acknowledged}) == len(acknowledged)
        by_number = {row["number"]: row for row in acknowledged}
        for row in acknowledged[1:]:
            assert row["verdict"] != "keep" or row["val_bpb"] < by_number[row["parent"]]["val_bpb"]
        words = [row["verdict"] for row in acknowledged]
        counts = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
        print(f"{len(words)} results in {time.perf_counter() - start:.0f} s: {counts}")
        print("\n".join(output.strip().split("\n")[-14:]))
        cluster.shutdown()


if __name__ == "__main__":
    main()

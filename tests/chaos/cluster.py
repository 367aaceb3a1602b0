"""Eight workers on four machines whose clocks are 10 minutes apart, on PostgreSQL and on a gRPC proxy in front of it.

    python tests/chaos/cluster.py --kills 30 --rounds 5

Workers are killed and replaced; meanwhile their connections are cut, the server has no connection to give, and the
proxy is killed and started again. Exits with 1 if a finished trial was lost, a trial is left RUNNING or made twice, a
living worker is taken for dead or quits, or files or processes are left; with 77 where there is no PostgreSQL.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import workers
from postgres import Server, Unavailable
from proxy import Proxy
from workers import STUDY, Machine, Witness, Workers, laboratory, leftovers, moment, survivors, taken_for_dead, verdict

from nas.study import trials as study_trials

ENDLESS = 1_000_000
APART_S = 600.0
MACHINES = [Machine("a"), Machine("b", APART_S), Machine("c"), Machine("d", -APART_S)]
LATENCY_S = 0.3
BEAT_S, LEASE_S = 0.5, 15.0
"""Short, so that a machine's dead workers are known within seconds; long enough for a live one on a busy machine."""


def run(
    folder: Path, server: Server, proxied: bool, size: int, machines: int, kills: int, rounds: int, away_s: float
) -> bool:
    """Every round takes the workers' connections away, and kills its part of the workers.

    Args:
        size: number of workers.
        machines: on which they are; 1 is this one.
        away_s: seconds in which there is no connection.
    """
    begun, database, stack = time.monotonic(), server.new_database(), ExitStack()
    proxy = stack.enter_context(Proxy(database)) if proxied else None
    team, witness = Workers(folder / "cluster", proxy.url if proxy else database, database), Witness()
    quit_by_themselves = started = 0

    def refill() -> None:
        nonlocal started
        while len(team.pids) < size:
            team.start(ENDLESS, MACHINES[started % machines] if machines > 1 else None)
            started += 1

    with stack:
        refill()
        team.wait_until_open()
        for part in range(rounds):
            for _ in range(kills * (part + 1) // rounds - len(team.killed)):
                moment(1.0)
                quit_by_themselves += len(team.quitters())
                if team.pids:
                    team.kill(random.choice(team.pids))
            witness.see(team.trials())
            refill()
            team.wait_until_open()
            server.cut()
            moment(1.0)
            if proxy:
                proxy.kill()
                time.sleep(away_s)
                proxy.start()
                moment(1.0)
            with server.full():
                time.sleep(away_s)
            moment(1.0)
            witness.see(team.trials())
        killed = len(team.killed)
        while team.pids:
            team.kill(team.pids[0])
        witness.see(team.trials())
        team.start(witness.count + size)
        codes = team.finish()
        trials, servers = team.trials(), [*server.pids(), *(proxy.pids if proxy else [])]
        faults = witness.faults(trials) | {
            "taken for dead": taken_for_dead(trials, team.killed),
            "temporary files": len(left := leftovers(folder, team.out / STUDY)),
            "processes": len(survivors(known=servers)),
            "workers that quit": quit_by_themselves + sum(code != 0 for code in codes),
            "times that nobody waited": rounds - min(rounds, team.log.read_text().count(" is back after")),
        }
    told = (
        f"{size} workers, {killed} kills, {rounds} times no connection in {time.monotonic() - begun:.0f} s, "
        f"{witness.count} finished trials seen of {len(trials)}"
    )
    return verdict("gRPC" if proxy else "PostgreSQL", faults, told, lambda: f"{left}\n{team.log.read_text()}")


def on_each(only: str | None, run: Callable[[Path, Server, bool], bool]) -> int:
    """The exit status of a script that runs on PostgreSQL and on a proxy in front of it; 77 where there is none.

    Args:
        only: "postgresql" or "grpc"; None: both.
        run: given a folder, the server and whether workers use the proxy; returns whether all was well.
    """
    good = True
    for name in ("postgresql", "grpc"):
        if only in (None, name):
            try:
                server = Server()
            except Unavailable as error:
                print(error)
                return 77
            with server, laboratory() as folder:
                good &= run(folder, server, name == "grpc")
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--machines", type=int, default=len(MACHINES), choices=range(1, len(MACHINES) + 1))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--away", type=float, default=5.0, help="seconds of each outage")
    parser.add_argument("--only", choices=("postgresql", "grpc"))
    args = parser.parse_args()
    workers.LATENCY_S = LATENCY_S
    study_trials.BEAT_S, lease = BEAT_S, study_trials.lease
    study_trials.lease = lambda trial: lease(trial, LEASE_S)
    counts = args.workers, args.machines, args.kills, args.rounds, args.away
    return on_each(args.only, lambda folder, server, proxy: run(folder, server, proxy, *counts))


if __name__ == "__main__":
    sys.exit(main())

"""Kill search workers (-9) at random moments on PostgreSQL, whose server is stopped and started twice meanwhile.

    python tests/chaos/outages.py --kills 20 --away 60

Exits with 1 if a finished trial was lost, a trial is left RUNNING or made twice, a worker quits, or files or processes
are left; with 77 where there is no PostgreSQL.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from cluster import on_each
from postgres import Server
from workers import STUDY, Witness, Workers, leftovers, moment, survivors, verdict

WORKERS = 4
ENDLESS = 1_000_000
OUTAGES = 2


def run(folder: Path, server: Server, kills: int, away_s: float) -> bool:
    workers, witness, begun = Workers(folder / "outages", server.new_database()), Witness(), time.monotonic()
    killed = quit_by_themselves = 0

    def kill_one() -> None:
        nonlocal killed, quit_by_themselves
        quit_by_themselves += len(workers.quitters())
        if workers.pids:
            killed += workers.kill(random.choice(workers.pids))

    def refill() -> None:
        while len(workers.pids) < WORKERS:
            workers.start(ENDLESS)

    refill()
    while not workers.log.exists() or not _complete(workers):
        time.sleep(0.1)
    for outage in range(OUTAGES + 1):
        part = kills * (outage + 1) // (OUTAGES + 1)
        while killed < part - (outage < OUTAGES):
            moment(1.5)
            kill_one()
            witness.see(workers.trials())
            refill()
        if outage < OUTAGES:
            workers.wait_until_open()
            moment(0.5)
            witness.see(workers.trials())
            server.stop()
            time.sleep(away_s / 2)
            kill_one()  # while it waits; it is replaced once the server is back: nothing starts without one
            time.sleep(away_s / 2)
            server.start()
            refill()
    while workers.pids:
        killed += workers.kill(workers.pids[0])
    witness.see(workers.trials())
    workers.start(witness.count + 10)
    codes = workers.finish()
    trials = workers.trials()
    faults = witness.faults(trials) | {
        "temporary files": len(left := leftovers(folder, workers.out / STUDY)),
        "processes": len(survivors(known=server.pids())),
        "workers that quit": quit_by_themselves + sum(code != 0 for code in codes),
    }
    waits = workers.log.read_text().count("is back after")
    told = (
        f"{killed} kills and {OUTAGES} outages of {away_s:g} s in {time.monotonic() - begun:.0f} s, {waits} waits, "
        f"{witness.count} finished trials seen of {len(trials)}"
    )
    return verdict("PostgreSQL", faults, told, lambda: f"{left}\n{workers.log.read_text()}")


def _complete(workers: Workers) -> bool:
    try:
        return any(trial.state.is_finished() for trial in workers.trials())
    except Exception:  # the tables are being made
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--away", type=float, default=60.0, help="seconds of each outage")
    args = parser.parse_args()
    return on_each("postgresql", lambda folder, server, _: run(folder, server, args.kills, args.away))


if __name__ == "__main__":
    sys.exit(main())

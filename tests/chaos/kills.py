"""Kill search workers (-9) at random moments on a journal: with a stand-in for measuring, and with real measuring.

    python tests/chaos/kills.py --kills 50 --real 10

Exits with 1 if a finished trial was lost, a trial is left RUNNING or made twice, or files or processes are left.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from workers import STUDY, Witness, Workers, laboratory, leftovers, moment, survivors, trials_of, verdict

ENDLESS = 1_000_000


def cheap(folder: Path, kills: int) -> bool:
    """Three workers at a time, one of which is killed and replaced."""
    workers, witness, begun = Workers(folder / "cheap"), Witness(), time.monotonic()
    for _ in range(3):
        workers.start(ENDLESS)
    killed = quit_by_themselves = 0
    while killed < kills:
        moment(3.0)
        quit_by_themselves += len(workers.quitters())
        if workers.pids:
            killed += workers.kill(random.choice(workers.pids))
        if (workers.out / STUDY / "study.journal").exists():
            witness.see(workers.trials())
        while len(workers.pids) < 3:
            workers.start(ENDLESS)
    while workers.pids:
        killed += workers.kill(workers.pids[0])
    witness.see(workers.trials())
    workers.start(witness.count + 10)
    codes = workers.finish()
    trials = workers.trials()
    faults = witness.faults(trials) | {
        "temporary files": len(left := leftovers(folder, workers.out / STUDY)),
        "processes": len(survivors()),
        "workers that quit": quit_by_themselves + sum(code != 0 for code in codes),
    }
    told = f"{killed} kills in {time.monotonic() - begun:.0f} s, {witness.count} finished trials seen of {len(trials)}"
    return verdict("stand-in", faults, told, lambda: f"{left}\n{workers.log.read_text()}")


def real(folder: Path, kills: int, longest_s: float) -> bool:
    """One command at a time, killed and given again; the last one runs to its end."""
    out, witness, begun = folder / "real", Witness(), time.monotonic()
    journal, log = out / STUDY / "study.journal", folder / "real.log"

    def start(trials: int) -> subprocess.Popen[bytes]:
        words = [
            *("search", "--latency-budget", "30ms", "--family", "shvit", "--resolution", "64", "--num-classes", "10"),
            *("--threads", "1", "--sampler", "random", "--trials", str(trials), "--study", STUDY, "--out", str(out)),
        ]
        with log.open("ab") as told:
            return subprocess.Popen([sys.executable, "-m", "nas.cli", *words], stdout=told, stderr=told)

    killed = 0
    for _ in range(kills):
        process = start(ENDLESS)
        moment(longest_s)
        killed += process.poll() is None
        process.kill()
        process.wait()
        if journal.exists():
            witness.see(trials_of(journal))
    process = start(witness.count + 3)
    try:
        code = process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    trials = trials_of(journal)
    faults = witness.faults(trials) | {
        "temporary files": len(left := leftovers(folder, out / STUDY)),
        "processes": len(survivors()),
        "workers that quit": kills - killed + (code not in (0, 1)),
    }
    told = f"{killed} kills in {time.monotonic() - begun:.0f} s, {witness.count} finished trials seen of {len(trials)}"
    return verdict("real measuring", faults, told, lambda: f"{left}\n{log.read_text()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--real", type=int, default=10, help="of them with real measuring")
    parser.add_argument("--longest", type=float, default=25.0, help="seconds that a real search runs at most before")
    args = parser.parse_args()
    with laboratory() as folder:
        parts = [cheap(folder, args.kills - args.real)]
        if args.real:
            parts.append(real(folder, args.real, args.longest))
    return 0 if all(parts) else 1


if __name__ == "__main__":
    sys.exit(main())

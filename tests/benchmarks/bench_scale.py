"""How a search grows with its workers and its trials: a simulated cluster on PostgreSQL and on a gRPC proxy.

    python tests/benchmarks/bench_scale.py --minutes 6 --write

Every worker is a process that runs `nas.search.loop.search` as if it had a board and a GPU of its own: what measures
and what trains only sleeps (3 s and 60 s, a fifth more or less at random). The storage, its lock, leases, the sampler
and the networks' documents are real, and all of them share this machine's CPUs. The ideal is what the workers would do
if nothing but these sleeps took time. Then the storage time of a trial in studies that hold few trials and many.

About 75 minutes with 6 minutes a row. --write enters the figures into tests/benchmarks/results/scale.json
and writes docs/results/scale.md; the readings in the former are written by hand. Needs PostgreSQL and grpcio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "chaos"))

import optuna  # noqa: E402
import psutil  # noqa: E402
import workers as chaos  # noqa: E402
from optuna.trial import FrozenTrial, TrialState, create_trial  # noqa: E402
from postgres import Server  # noqa: E402
from proxy import Proxy  # noqa: E402
from write_pages import Page, Section, pages  # noqa: E402

from nas.measure.samples import Measurement  # noqa: E402
from nas.networks.counts import counts_of  # noqa: E402
from nas.search import finder, loop  # noqa: E402
from nas.search import trial as search_trial  # noqa: E402
from nas.search.log import SearchLog  # noqa: E402
from nas.search.request import SearchRequest  # noqa: E402
from nas.study import patient  # noqa: E402
from nas.study.samplers import make_sampler  # noqa: E402
from nas.study.trials import ask, due, finish, open_study  # noqa: E402

SIZES = (1, 2, 4, 8, 32, 128)
STORAGES = ("postgresql", "grpc")
HELD = (100, 10_000)
"""Trials that a study holds when a trial's storage time is taken."""
TAKEN = 20
"""Trials whose storage time is taken."""
MS_PER_MAC = 5e-8
"""Of the simulated boards, about: a network's own factor is drawn by its digest."""
ENDLESS = 1_000_000
JITTER = 0.2
PAGE = HERE / "results" / "scale.json"


@dataclass
class Meter:
    """What a worker's time went to, in seconds."""

    slept_s: float = 0.0
    """For measuring and training: the ideal."""
    storage_s: float = 0.0
    """In calls of the storage, those under the lock included."""
    waited_s: float = 0.0
    """For the lock."""
    longest_s: float = 0.0
    """Of such a wait."""
    held_s: float = 0.0
    """With it: the sampler included."""
    calls: int = 0
    told: int = 0
    """Trials."""


@dataclass(frozen=True)
class Row:
    """A cluster's figures; seconds are means of a trial."""

    storage: str
    workers: int
    trials: int
    """Told within the time that is compared."""
    per_hour: float
    ideal_per_hour: float
    storage_s: float
    waited_s: float
    longest_s: float
    held_s: float
    worker_cpu_s: float
    server_cpu_s: float
    machine_busy: float
    """Share of this machine's CPUs that was in use, by anybody."""
    duplicates: int
    """Trials, retries or published networks that were made twice."""
    repeated: int
    """Trials of a network that another trial had had."""
    lost: int
    """Trials that a worker had told and the study does not hold, or that are left running."""
    quit: int
    """Workers that ended with an error."""

    @property
    def share(self) -> float:
        return self.per_hour / self.ideal_per_hour

    def cells(self) -> list[str]:
        return [
            {"postgresql": "PostgreSQL", "grpc": "gRPC proxy"}[self.storage],
            str(self.workers),
            str(self.trials),
            f"{self.per_hour:.0f}",
            f"{self.ideal_per_hour:.0f}",
            f"{100 * self.share:.1f}%",
            f"{self.storage_s:.2f}",
            f"{self.waited_s:.2f}",
            f"{self.longest_s:.1f}",
            f"{self.held_s:.2f}",
            f"{self.worker_cpu_s:.2f}",
            f"{self.server_cpu_s:.2f}",
            f"{100 * self.machine_busy:.0f}%",
            str(self.duplicates),
            str(self.repeated),
            str(self.lost),
            str(self.quit),
        ]


COLUMNS = [
    *("storage", "workers", "trials", "trials an hour", "ideal", "of the ideal"),
    *(
        "storage s",
        "waiting for the lock s",
        "the longest s",
        "lock held s",
        "worker CPU s",
        "server CPU s",
        "machine busy",
    ),
    *("duplicates", "repeated proposals", "lost", "workers that quit"),
]
HELD_TEXT = (
    "A trial without its network: due, asked for, its parameters and results stored, told, shown. CPU time, so that "
    "other work on the machine matters little."
)
HELD_COLUMNS = ["storage", "trials held", "CPU ms of a trial", "of them of the server", "times that of the first row"]

ZEROS = 64 * "0"
COPIES = [
    "INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete) SELECT n, study_id, state, "
    "datetime_start, datetime_complete FROM trials, generate_series(1, {last} - 1) n",
    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) SELECT t.trial_id, param_name, "
    "CASE param_name WHEN 'family' THEN param_value ELSE floor(random() * 7) END, distribution_json "
    "FROM trial_params, trials t WHERE number > 0",
    "INSERT INTO trial_values (trial_id, objective, value, value_type) SELECT t.trial_id, objective, value, value_type "
    "FROM trial_values, trials t WHERE number > 0",
    "INSERT INTO trial_system_attributes (trial_id, key, value_json) SELECT t.trial_id, key, value_json "
    "FROM trial_system_attributes, trials t WHERE number > 0",
    "INSERT INTO trial_user_attributes (trial_id, key, value_json) SELECT t.trial_id, key, "
    "replace(value_json, repeat('0', 64), lpad(number::text, 64, '0')) FROM trial_user_attributes, trials t "
    "WHERE number > 0",
    "ANALYZE",
]
"""Statements that copy the one trial of a database."""

meter = Meter()
jitter = random.Random()


def sleep(seconds: float) -> None:
    seconds *= jitter.uniform(1 - JITTER, 1 + JITTER)
    time.sleep(seconds)
    meter.slept_s += seconds


class Exporter(chaos.Exporter):
    """Writes what the board will need: how large the network is."""

    def write(self, network: Any, settings: Any, stem: Path) -> Path:
        own = random.Random(network.digest()).uniform(0.9, 1.1)
        stem.write_text(str(counts_of(network).macs * MS_PER_MAC * own))
        return stem


def stand_in(measure_s: float, train_s: float) -> None:
    """Let what measures and trains sleep, and the meter run."""

    class Measurer(chaos.Measurer):
        def measure(self, path: Path, *_: Any, **__: Any) -> Measurement:
            sleep(measure_s)
            ms = float(path.read_text())
            return Measurement([[ms, ms]] * 6, [[1.0, 1.0]] * 6)

    judge, wait, exclusive = search_trial.judge, patient.PatientStorage.wait, patient.exclusive

    def trained(*given: Any, **named: Any) -> bool:
        sleep(train_s)
        return judge(*given, **named)

    def waited(self: Any, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if getattr(call, "__name__", "") == "decide" or threading.current_thread() is not threading.main_thread():
            return wait(self, call, *given, **named)
        begun = time.perf_counter()
        try:
            return wait(self, call, *given, **named)
        finally:
            meter.storage_s += time.perf_counter() - begun
            meter.calls += 1

    @contextmanager
    def held(storage: Any) -> Iterator[Any]:
        begun = time.perf_counter()
        with exclusive(storage) as connection:
            entered = time.perf_counter()
            meter.waited_s += entered - begun
            meter.longest_s = max(meter.longest_s, entered - begun)
            yield connection
            meter.held_s += time.perf_counter() - entered

    search_trial.judge, search_trial.Exporter = trained, Exporter
    search_trial.open_measurer = lambda *_: Measurer()
    patient.PatientStorage.wait, patient.exclusive = waited, held
    finder.Finder.nothing_better = lambda _: False  # it goes on as long as it is asked


def request(out: Path, storage: str | None, seconds: float) -> SearchRequest:
    found = chaos.options(out, storage, ENDLESS)
    families = ("efficientvit", "levit", "shvit", "evit")
    return replace(found, families=families, sampler="auto", timeout_s=seconds, resolution=224)


class Cluster(chaos.Workers):
    """Forks that search until a time is up; each leaves what its meter said after every trial."""

    def __init__(self, out: Path, storage: str, looked_at: str) -> None:
        super().__init__(out, storage, looked_at)
        search_trial.Exporter, search_trial.open_measurer = Exporter, lambda *_: chaos.Measurer()

    def run(self, index: int, seconds: float) -> None:
        pid = os.fork()
        if pid:
            self.pids.append(pid)
            return
        code = 1
        try:
            log = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            jitter.seed(index)
            chaos.Machine(f"machine {index}").pretend()
            lines = (self.out / f"worker {index}.jsonl").open("w")

            def progress(_: Any) -> None:
                spent = asdict(meter) | {"at": time.monotonic(), "cpu_s": time.process_time()}
                print(json.dumps(spent), file=lines, flush=True)
                meter.told += 1

            loop.search(request(self.out, self.storage, seconds), progress, lambda _: None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def cpu_s(server: Server | None, proxy: Proxy | None) -> float:
    """CPU time of a database's and a proxy's processes, and of the children that they have reaped."""
    total = 0.0
    for pid in [*(server.pids() if server else []), *(proxy.pids if proxy else [])]:
        try:
            spent = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def cluster(
    name: str, size: int, minutes: float, measure_s: float, train_s: float, server: Server, folder: Path
) -> Row:
    """Run a cluster for some minutes beyond its workers' first trials."""
    database = server.new_database()
    with Proxy(database) if name == "grpc" else nullcontext() as proxy:
        team = Cluster(folder / f"{name} {size}", proxy.url if proxy else database, database)
        stand_in(measure_s, train_s)
        spent, used, begun = cpu_s(server, proxy), psutil.cpu_times(), time.monotonic()
        for index in range(size):
            team.run(index, 60 * minutes)
        codes = team.finish(60 * minutes + 40 * (measure_s + train_s) + 300)
        spent = cpu_s(server, proxy) - spent
        now = psutil.cpu_times()
        idle = now.idle + now.iowait - used.idle - used.iowait
        busy = 1 - idle / ((time.monotonic() - begun) * (os.cpu_count() or 1))
        found = team.trials()
    if any(codes):
        print(team.log.read_text()[-2000:], file=sys.stderr)
    return _row(name, size, [*team.out.glob("worker *.jsonl")], found, spent, busy, sum(code != 0 for code in codes))


def _row(
    name: str, size: int, files: Sequence[Path], trials: Sequence[FrozenTrial], spent: float, busy: float, quit: int
) -> Row:
    """A worker's first line is from before its first trial; what lies between it and the last line is compared."""
    spans = []
    for path in files:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if len(lines) > 1:
            first, last = lines[0], lines[-1]
            spans.append({key: last[key] - first[key] for key in first} | {"longest_s": last["longest_s"]})
    total = {key: sum(span[key] for span in spans) for key in spans[0]}
    told, longest = int(total["told"]), max(span["longest_s"] for span in spans)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    networks = Counter(trial.user_attrs["detail"]["digest"] for trial in complete)
    witness = chaos.Witness()
    witness.see(trials)
    faults = witness.faults(trials)
    lost = max(0, told - len(complete)) + faults["left RUNNING"] + faults["retries forgotten"]
    return Row(
        storage=name,
        workers=size,
        trials=told,
        per_hour=3600 * size * told / total["at"],
        ideal_per_hour=3600 * size * told / total["slept_s"],
        storage_s=total["storage_s"] / told,
        waited_s=total["waited_s"] / told,
        longest_s=longest,
        held_s=total["held_s"] / told,
        worker_cpu_s=total["cpu_s"] / told,
        server_cpu_s=spent / len(complete),
        machine_busy=busy,
        duplicates=faults["duplicates"],
        repeated=sum(networks.values()) - len(networks),
        lost=lost,
        quit=quit,
    )


# ------------------------------------------------------------------------- trials held


def example(folder: Path) -> FrozenTrial:
    """A trial as a search tells it."""
    chaos.search_trial.Exporter, chaos.search_trial.open_measurer = chaos.Exporter, lambda *_: chaos.Measurer()
    loop.write_hardware = lambda *_: {"busy_share": None}
    study, _ = loop.search(chaos.options(folder / "example", None, 1), lambda _: None, lambda _: None)
    return study.trials[0]


def fill(storage: str, trial: FrozenTrial, count: int) -> None:
    """Put a study with `count` ended trials of as many networks into a storage: copies of one, made in seconds."""
    study = open_study(chaos.STUDY, storage, {"space": ""}, make_sampler("random", None))
    detail = trial.user_attrs["detail"] | {"digest": ZEROS, "key": ZEROS}
    study.add_trial(
        create_trial(
            params=trial.params,
            distributions=trial.distributions,
            values=[60.0, 1000.0],
            user_attrs={**trial.user_attrs, "detail": detail},
            system_attrs={"constraints:latency": -0.5},
        )
    )
    if storage.startswith("postgresql://"):
        import psycopg

        with psycopg.connect(storage) as connection:
            for statement in COPIES:
                connection.execute(statement.format(last=count))
        return
    first, rng = Path(storage).read_text().splitlines()[-1], random.Random(1)
    with Path(storage).open("a") as journal:
        for number in range(1, count):
            line = json.loads(first.replace(ZEROS, f"{number:064d}"))
            line["params"] = {
                name: value if name == "family" else rng.randrange(7) for name, value in line["params"].items()
            }
            print(json.dumps(line, separators=(",", ":")), file=journal)


def trial_cpu_s(storage: str, trial: FrozenTrial, folder: Path, servers: Callable[[], float]) -> tuple[float, float]:
    """CPU seconds of a trial without its network: what the storage and the study cost, and the servers' part."""
    study = open_study(chaos.STUDY, storage, {"space": ""}, make_sampler("random", None))
    asked, log = chaos.options(folder, None, ENDLESS), SearchLog("")

    def one() -> None:
        due(study, ENDLESS, print)
        begun = ask(study)
        for name, distribution in trial.distributions.items():
            begun._suggest(name, distribution)
        finish(study, begun, 60.0, 1000.0, -0.5, trial.user_attrs)
        loop.state_of(study, asked, log)

    for _ in range(3):
        one()
    spent, of_servers = time.process_time(), servers()
    for _ in range(TAKEN):
        one()
    of_servers = servers() - of_servers
    return (time.process_time() - spent + of_servers) / TAKEN, of_servers / TAKEN


def in_a_child(call: Callable[[], Any]) -> Any:
    """What a call returns in a fork: gRPC bears no fork after it was used."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            found = call()
            os.write(told, json.dumps(asdict(found) if isinstance(found, Row) else found).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(told)
    with os.fdopen(ready) as answer:
        found = answer.read()
    os.waitpid(pid, 0)
    return json.loads(found)


def held_rows(counts: Sequence[int], server: Server, folder: Path) -> list[list[str]]:
    rows, first = [], {}
    trial = example(folder)
    for count in counts:
        for name in ("journal", *STORAGES):
            database = str(folder / f"{count}.journal") if name == "journal" else server.new_database()
            proxied: AbstractContextManager[Any] = Proxy(database) if name == "grpc" else nullcontext()
            in_a_child(partial(fill, database, trial, count))
            with proxied as proxy:
                used = server if name != "journal" else None
                url = proxy.url if proxy else database
                whole, theirs = in_a_child(
                    partial(trial_cpu_s, url, trial, folder, partial(cpu_s, used, proxy if proxy else None))
                )
            times = whole / first.setdefault(name, whole)
            label = {"journal": "journal", "postgresql": "PostgreSQL", "grpc": "gRPC proxy"}[name]
            rows.append([label, f"{count:,}", f"{1000 * whole:.0f}", f"{1000 * theirs:.0f}", f"{times:.2f}"])
            print(*rows[-1], sep="  ", flush=True)
    return rows


# -------------------------------------------------------------------------------- the page


def write(heading: str, columns: list[str], rows: list[list[str]], text: list[str], command: str) -> None:
    """Enter a table into the page's file; its reading stays."""
    page = (
        Page.model_validate_json(PAGE.read_bytes())
        if PAGE.exists()
        else Page(
            title="Many workers",
            about="Whether a search grows with its workers: a simulated cluster on one small machine. "
            "[Several machines](../guides/machines.md) says how to start one.",
            sections=[],
        )
    )
    earlier = next((section for section in page.sections if section.heading == heading), None)
    section = Section(
        heading=heading,
        machine=earlier.machine if earlier else "Intel Xeon, 2 cores of a virtual machine",
        software=f"Python {platform.python_version()}, optuna {optuna.__version__}, PostgreSQL and gRPC on loopback",
        date=date.today().isoformat(),
        command=command,
        text=text,
        columns=columns,
        rows=rows,
        reading=earlier.reading if earlier else [],
    )
    kept = [section if each.heading == heading else each for each in page.sections]
    page = page.model_copy(update={"sections": kept if earlier else [*kept, section]})
    PAGE.write_text(json.dumps(page.model_dump(), indent=1, ensure_ascii=False) + "\n")
    for path, content in pages().items():
        path.write_text(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="of each cluster")
    parser.add_argument("--workers", type=int, nargs="*", default=SIZES)
    parser.add_argument("--storages", nargs="*", default=STORAGES, choices=STORAGES)
    parser.add_argument("--measure", type=float, default=3.0, help="seconds that measuring a network takes")
    parser.add_argument("--train", type=float, default=60.0, help="seconds that a training takes")
    parser.add_argument("--held", type=int, nargs="*", default=HELD, help="trials in the studies of the second table")
    parser.add_argument("--write", action="store_true", help=f"enter the figures into {PAGE.name}")
    args = parser.parse_args()
    command = " ".join(["python tests/benchmarks/bench_scale.py", *sys.argv[1:]])
    server = Server(connections=3 * max(args.workers, default=1) + 50)
    with server, chaos.laboratory() as folder:
        rows = []
        for name in args.storages:
            for size in args.workers:
                rows.append(
                    in_a_child(partial(cluster, name, size, args.minutes, args.measure, args.train, server, folder))
                )
                print(*Row(**rows[-1]).cells(), sep="  ", flush=True)
        if rows and args.write:
            text = [
                f"Measuring a network takes {args.measure:g} s and a training {args.train:g} s, a fifth more or less, "
                "drawn at random: a sleep each, on a board and a GPU that every worker has for itself. All else is "
                f"real and shares the machine's 2 cores. {args.minutes:g} minutes a row. Seconds are means of a trial."
            ]
            write("Workers", COLUMNS, [Row(**row).cells() for row in rows], text, command)
        if args.held:
            found = held_rows(args.held, server, folder)
            if args.write:
                text = [HELD_TEXT]
                write("Trials that a study holds", HELD_COLUMNS, found, text, command)


if __name__ == "__main__":
    main()

"""The papers' claims on this machine as Markdown, with the date and the hardware: the table of docs/results/papers.md.

    python tests/benchmarks/bench_papers.py [--only PAPER|CLAIM ...] [--runtime NAME] [--device NAME] [--threads N]
        [--batch-size N] [--rounds N] [--json FILE]

The same as `vitnas bench --suite papers`, for a machine that is otherwise idle.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

from nas.bench.papers import papers_markdown, run_papers
from nas.measure import hardware
from nas.measure.device import check_settings, default_threads
from nas.measure.runtime import Settings
from nas.measure.samples import SURE_ROUNDS


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=SURE_ROUNDS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    settings = Settings(given.runtime, given.device, given.threads, given.batch_size)
    check_settings(settings)
    started = datetime.datetime.now(datetime.UTC)
    result = run_papers(settings, given.rounds, say=lambda line: print(line, file=sys.stderr), only=given.only)
    if given.json:
        given.json.write_text(json.dumps(result.to_json(), indent=1))
    took = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
    machine = hardware.describe(settings)
    about = f"{machine['cpu']}, {machine['usable_cpus']} CPUs, {given.runtime} {machine['runtime_version']}"
    print(f"{started:%Y-%m-%d}, {about}, load {machine['load_average'][0]} at the end, {took:.0f} s\n")
    print(papers_markdown(result))
    return int(result.interrupted is not None)


if __name__ == "__main__":
    sys.exit(main())

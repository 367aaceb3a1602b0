"""The measuring process with short slices, for tests whose latencies may be rough."""

from nas.measure import worker

worker.WARM_UP_MS, worker.UNTIMED_MS, worker.SLICE_MS = 5, 1, 1

if __name__ == "__main__":
    worker.main()

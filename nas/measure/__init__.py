"""An exported network and the settings of a device become a latency with its spread.

`runtime.py` is the registry of runtimes, `runtimes/` holds one file each; `worker.py` is the process that holds one
network and times it, `protocol.py` decides when which process runs. `remote.py` and `agent.py` have all that done on
another machine; `device.py` takes either. Importing this package registers the runtimes and imports none of their
libraries.
"""

from nas.measure.runtimes import compiled, cudagraphs, eager, openvino, ort  # noqa: F401

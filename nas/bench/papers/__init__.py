"""`vitnas bench --suite papers`: the speed claims of the five papers as ratios on this machine.

`claims.py` holds the claims as data, `suite.py` measures them and judges, `table.py` shows the rows; `blocks.py` and
`worker.py` build and time single blocks in PyTorch. Importing this package imports neither torch nor timm.
"""

from nas.bench.papers.claims import CLAIMS, Claim
from nas.bench.papers.suite import run_papers
from nas.bench.papers.table import papers_csv, papers_markdown, papers_table

__all__ = ["CLAIMS", "Claim", "papers_csv", "papers_markdown", "papers_table", "run_papers"]

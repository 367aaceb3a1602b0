"""Write the table of published facts: python tests/benchmarks/write_published.py TIMM

TIMM is a CSV of timm's own results on ImageNet-1k (columns name with tag, mmacs, resolution, top1, distilled). The size
prior is fitted to a selection of it: of each network the recipe that timm takes by default, at the resolution it was
trained for, of each family at most six networks, evenly over their sizes, so that no family outweighs others, and none
that has not 30 MMACs to 6 GMACs. The published variants of the five families are added from their own papers; timm's
figures of the same networks are left out, as are SSLD's, which were distilled with images beyond ImageNet-1k. Of the
designs that a search is held against every recipe at every resolution is kept, too (column fit: 0). MACs and parameters
are counted here: fvcore's conventions, attention's products counted, BatchNorm not.
Ten minutes.
"""

from __future__ import annotations

import csv
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape

from nas.networks.counts import counts_of
from nas.search.rivals import DESIGNS
from search_spaces import get_arch
from search_spaces.registry import FAMILIES

LEAST, MOST = 30e6, 6e9
"""MACs of the networks that the prior is fitted to."""
OURS = ("levit", "shvit", "efficientvit_m", "deit_tiny_patch", "deit_small_patch", "deit_base_patch")
"""First letters of timm's names of the five families' networks."""
STARTS = {
    "mobilenetv3_small": "mobilenetv3_small",
    "efficientvit_": "efficientvit_mit",
    "deit_": "evit",
    "vit_": "vit",
} | {start: start for start in ("efficientnetv2", "efficientnet_lite", "deit3")}
PARTS = ("resn", "densenet", "dla", "dpn", "selecsls", "halo", "botnet", "cspres", "cs3")
EACH = 6
"""Networks of a family, at most."""
MORE_IMAGES = "ssld"
"""In names and tags of networks that were taught on images beyond ImageNet-1k."""
NO_TOP1_OF_ITS_OWN = ("sepvit",)
"""Families whose published figures were not checked against a table of the authors."""
COLUMNS = ("name", "family", "params", "macs", "resolution", "distilled", "top1", "source", "fit")


def family_of(name: str) -> str:
    """What timm's networks of one design have in common."""
    name = name.removeprefix("tf_").removeprefix("legacy_").removeprefix("gc_")
    if name.startswith("test_"):
        return "_".join(name.split("_")[:2]).rstrip("0123456789")
    for start, family in STARTS.items():
        if name.startswith(start):
            return family
    for part in PARTS:
        if part in name:
            return "resnet" if part == "resn" else part
    return name.split("_")[0]


def count(name: str, resolution: int) -> tuple[int, int]:
    """Parameters and MACs of one of timm's networks."""

    def attention(inputs: list[Any], outputs: list[Any]) -> int:
        *batch, queries, key_dim = get_shape(inputs[0])
        *_, keys, value_dim = get_shape(inputs[2])
        return int(torch.tensor(batch).prod()) * queries * keys * (key_dim + value_dim)

    try:
        model = timm.create_model(name, img_size=resolution)
    except TypeError:
        model = timm.create_model(name)
    model.eval()
    counter = FlopCountAnalysis(model, torch.zeros(1, 3, resolution, resolution))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    counter.set_op_handle("aten::scaled_dot_product_attention", attention)
    counter.set_op_handle("aten::batch_norm", None)
    return sum(each.numel() for each in model.parameters()), int(counter.total())


def results_of(path: Path) -> list[dict[str, str]]:
    """timm's results that may be kept, with the name of their family."""
    with path.open() as file:
        rows = [row | {"family": family_of(row["name"].partition(".")[0])} for row in csv.DictReader(file)]
    return [row for row in rows if not row["name"].startswith(OURS) and MORE_IMAGES not in row["name"]]


def chosen(results: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those that the prior is fitted to, whatever their MACs."""
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for row in results:
        name, _, tag = row["name"].partition(".")
        found.setdefault(name, {}).setdefault(tag, []).append(row)
    families: dict[str, list[dict[str, str]]] = {}
    for name, tags in sorted(found.items()):
        default = timm.get_pretrained_cfg(name)
        tag = default.tag if default is not None and default.tag in tags else sorted(tags)[0]
        size = timm.get_pretrained_cfg(f"{name}.{tag}").input_size[-1]
        row = min(tags[tag], key=lambda each: (int(each["resolution"]) != size, int(each["resolution"])))
        families.setdefault(row["family"], []).append(row)
    kept = []
    for _, rows in sorted(families.items()):
        rows.sort(key=lambda row: float(row["mmacs"]))
        steps = {round(i * (len(rows) - 1) / (EACH - 1)) for i in range(EACH)} if len(rows) > EACH else range(len(rows))
        kept += [rows[i] for i in sorted(steps)]
    return kept


def rows_of_timm(path: Path) -> list[tuple[Any, ...]]:
    rows, results = [], results_of(path)
    fitted = chosen(results)
    others = [row for row in results if row["family"] in DESIGNS and row not in fitted]
    for row in (*fitted, *others):
        name, resolution = row["name"], int(row["resolution"])
        try:
            params, macs = count(name.partition(".")[0], resolution)
        except Exception as error:  # timm's networks raise whatever their authors thought of
            print(f"{name} at {resolution} px is left out: {str(error)[:120]}", file=sys.stderr)
            continue
        fit = row in fitted and LEAST <= macs <= MOST
        if fit or row["family"] in DESIGNS:
            facts = (params, macs, resolution, row["distilled"], row["top1"], "timm")
            rows.append((name, row["family"], *facts, int(fit)))
    return rows


def rows_of_ours() -> list[tuple[Any, ...]]:
    rows = []
    for family, entry in FAMILIES.items():
        for name, variant in entry.variants.items():
            if variant.top1 is not None and family not in NO_TOP1_OF_ITS_OWN:
                arch = get_arch(name)
                counts = counts_of(arch)
                distilled = int(getattr(arch, "distilled", False))
                facts = (counts.params, counts.macs, arch.resolution, distilled, variant.top1, variant.source)
                if LEAST <= counts.macs <= MOST:
                    rows.append((name, family, *facts, 1))
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    rows = [*rows_of_ours(), *rows_of_timm(Path(sys.argv[1]))]
    target = Path(__file__).parents[2] / "nas/quality/published.csv"
    with target.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    main()

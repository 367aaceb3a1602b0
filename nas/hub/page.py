"""A repository's page, README.md: what the network is, how good and how fast, and how it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nas.export.card import CLASSIFY, Accuracy, Card, Latency
from nas.export.quantize import LISTED
from nas.hub.facts import RunFacts
from nas.intervals import top1_words
from nas.measure.runtime import LOWER
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.units import counted, listed, shown

if TYPE_CHECKING:
    from search_spaces import Arch

NAMED = 20
"""Classes that are named."""


@dataclass(frozen=True)
class OnnxFacts:
    """An ONNX file of the repository."""

    name: str
    bytes: int
    card: Card
    plain: bool
    """Whether it takes what `CLASSIFY` gives it: one image, or any number."""
    left_in_float: tuple[str, ...] | None = None
    """Of int8, as `nas.export.quantize.left_in_float` tells it."""


@dataclass(frozen=True)
class Subject:
    """What a page is about."""

    repository: str
    """OWNER/NAME."""
    revision: str | None
    """None: main."""
    network: Arch | TimmNetwork
    params: int
    macs: int
    """Multiply-accumulates of one image."""
    files: Sequence[OnnxFacts]
    """model.onnx first."""
    run: RunFacts


def page(subject: Subject) -> str:
    """The Markdown, below a header of metadata."""
    return f"---\n{_header(subject)}\n---\n\n" + "\n\n".join(_parts(subject)) + "\n"


def _header(subject: Subject) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    accuracy = subject.files[0].card.accuracy
    results = None
    if accuracy is not None:
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type="imagefolder",
                dataset_name=accuracy.data,
                metric_type="accuracy",
                metric_value=round(accuracy.top1, 2),
                metric_name="top-1",
            )
        ]
    return ModelCardData(
        library_name="timm" if isinstance(subject.network, TimmNetwork) else "vitnas",
        pipeline_tag="image-classification",
        tags=["image-classification", "vitnas", "onnx", subject.network.family],
        model_name=_name(subject),
        eval_results=results,
    ).to_yaml()


def _name(subject: Subject) -> str:
    return subject.repository.partition("/")[2]


def _parts(subject: Subject) -> list[str]:
    network, first = subject.network, subject.files[0]
    named = f"{TIMM}{network.name}" if isinstance(network, TimmNetwork) else f"a network of the family {network.family}"
    parts = [
        f"# {_name(subject)}",
        f"An image classifier: {named}, {network.resolution} px, {network.num_classes:,} classes, "
        f"{subject.params / 1e6:.2f} M parameters, {subject.macs / 1e6:.1f} MMACs. Made with vitnas.",
    ]
    if first.card.classes:
        parts.append(f"Classes: {_text(listed(first.card.classes, NAMED))}.")
    parts += ["## Accuracy and latency", _own_table(subject)]
    for file in subject.files:
        if file.left_in_float is not None:
            parts.append(f"{file.name} is int8; in float: {_text(listed(file.left_in_float, LISTED) or 'nothing')}.")
    if subject.run.rows:
        parts += [f"{subject.run.title}, measured side by side in one run:", _run_table(subject.run)]
    parts.append(
        "Latency is the median of single inferences in a process of its own, with the 95% interval of that median. "
        "Compare latencies within one table only."
    )
    if subject.run.data:
        parts += ["## Data", f"Trained on {_text(subject.run.data)}."]
    return [*parts, *_use(subject, first)]


def _use(subject: Subject, first: OnnxFacts) -> list[str]:
    at = f" --revision {subject.revision}" if subject.revision else ""
    folder = _name(subject)
    parts = [
        "## Use",
        f"```sh\nhf download {subject.repository}{at} --local-dir {folder}\ncd {folder}\n```",
        "`model.onnx` says itself how its images are prepared and what its classes are called.",
    ]
    if first.plain:
        parts += ["With ONNX Runtime, Pillow and NumPy alone:", f"```python\n{CLASSIFY}```"]
    named = f"hf-hub:{subject.repository}" + (f"@{subject.revision}" if subject.revision else "")
    return [
        *parts,
        "With vitnas:",
        f"```sh\nvitnas predict model.onnx photo.jpg\nvitnas train {named} --data ./images\n```",
    ]


def _own_table(subject: Subject) -> str:
    rows = []
    for file in subject.files:
        latency = file.card.latency or _of_run(subject.run.latency, file.name)
        rows.append((file.name, f"{file.bytes / 1e6:.2f} MB", _accuracy(file.card.accuracy), *_latency(latency)))
    return _table(("file", "size", "top-1", "latency", "measured on"), rows)


def _of_run(latency: Latency | None, name: str) -> Latency | None:
    """What the run measured, if it was this file. bf16 has none: model.onnx tells its accuracy in fp32."""
    if latency is None:
        return None
    lower = latency.precision in LOWER
    return latency if name == (f"model.{latency.precision}.onnx" if lower else "model.onnx") else None


def _accuracy(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not measured"
    return f"{top1_words(accuracy.top1, accuracy.ci, accuracy.images)}, {accuracy.data}"


def _latency(latency: Latency | None) -> tuple[str, str]:
    if latency is None:
        return "not measured", ""
    low, high = latency.ci
    where = latency.device if latency.cpu is None else f"{latency.cpu}"
    how = f"{latency.runtime} {latency.precision}, {counted(latency.threads, 'thread')}, batch {latency.batch_size}"
    return f"{latency.ms:.2f} ms (95%: {low:.2f} to {high:.2f})", f"{where}, {how}"


def _run_table(run: RunFacts) -> str:
    lower = any({row.top1_precision, row.latency_precision} - {"fp32"} for row in run.rows)

    def spanned(value: float | None, span: tuple[float, float] | None, unit: str, digits: int, precision: str) -> str:
        if value is None:
            return ""
        told = f"{value:.{digits}f}{unit}" + f" in {precision}" * lower
        return told if span is None else f"{told} (95%: {span[0]:.{digits}f} to {span[1]:.{digits}f})"

    found = [
        (
            row.name,
            spanned(row.top1, row.top1_ci, "%", 1, row.top1_precision),
            spanned(row.latency_ms, row.latency_ci, " ms", 2, row.latency_precision),
        )
        for row in run.rows
    ]
    return _table(("network", run.measure, "latency"), found)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """Text in Markdown, where names of classes and folders stand for nothing but themselves."""
    return "".join(f"\\{each}" if each in "\\`*_[]<>|#" else each for each in shown(text))

"""`vitnas evaluate`: networks judged on the same images, as they are deployed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.batches import skipped_line
from nas.data.decoding import decode
from nas.errors import UserError
from nas.evaluate.classes import Matched, match
from nas.evaluate.images import JudgedImages, open_images
from nas.evaluate.judge import Pass, judge
from nas.evaluate.metrics import by_class, calibration, calibration_error, confusion, top1, top5
from nas.evaluate.networks import Judged, open_networks
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.pairs import compare
from nas.evaluate.report import REPORT, RESULT, write_report
from nas.evaluate.result import ClassResult, ConfusionCell, EvaluateResult, Mistake, ModelResult, Speed
from nas.evaluate.speed import Timed, time_networks
from nas.files import job_folder
from nas.intervals import guessing
from nas.job import now
from nas.measure.device import settings_for
from nas.units import counted, listed

if TYPE_CHECKING:
    from nas.evaluate.request import EvaluateRequest

Progress = Callable[[str, int, int], None]


def evaluate(
    request: EvaluateRequest,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> EvaluateResult:
    """Judge networks on the same images, compare each two of them, and time them side by side.

    Each image is decoded once. An image that cannot be decoded is left out for all networks, and named.

    Args:
        progress: called with (what goes on, done, in all).
        say: called with a line on what is judged.

    Raises:
        UserError: a network that cannot be opened, no images, classes that do not match, or a folder that cannot be
            written; nothing has been written then.
        KeyboardInterrupt: before all images were judged.
    """
    request.check()
    folder = Path(request.folder) if request.folder is not None else None
    if folder is not None and (folder / REPORT).exists() and not (folder / RESULT).exists():
        raise UserError(f"{folder} holds the {REPORT} of another run: give another --out")
    with job_folder(folder) if folder is not None else nullcontext():
        return _evaluate(request, progress, say)


def _evaluate(request: EvaluateRequest, progress: Progress, say: Callable[[str], None]) -> EvaluateResult:
    started = now()
    threads = settings_for(threads=request.threads).threads
    progress("opening the networks", 0, 0)
    opened, refused = open_networks(request, threads)
    networks = labelled(opened)
    progress("looking at the images", 0, 0)
    images = open_images(request.data, request.split, request.limit, [each.weights for each in networks.values()])
    matched = {
        label: match(images.classes, each.classifier.classes, each.classifier.num_classes, each.name)
        for label, each in networks.items()
    }
    say(described(images))
    judged = judge(networks, matched, images, threads, lambda done: progress("judging", done, len(images.images)))
    timed = Timed()
    if request.throughput:
        timed = time_networks(networks, threads, lambda done, total: progress("measuring, rounds", done, total))
    results = [
        _result(label, each, matched[label], images, judged, timed.speeds.get(label))
        for label, each in networks.items()
    ]
    result = EvaluateResult(
        data=images.name,
        part=images.part,
        images=len(judged.kept),
        classes=images.classes,
        skipped=[str(name) for name in judged.skipped],
        results=results,
        pairs=compare({label: answers.right for label, answers in judged.answers.items()}),
        notes=[*_notes(networks, matched, images, judged), *map(_sentence, refused), *map(_sentence, timed.notes)],
        cpu=timed.cpu,
        started=started,
        finished=now(),
        interrupted=timed.interrupted,
    )
    if request.folder is not None:
        write_report(Path(request.folder), result, lambda index: decode(images.images.sources[index]))
    return result


def described(images: JudgedImages) -> str:
    """What is judged, in a line."""
    part = f" ({images.part})" if images.part else ""
    many = len(images.classes)
    return f"{images.name}{part}: {counted(len(images.images), 'image')} of {many:,} class{'es' * (many != 1)}"


def labelled(networks: Sequence[Judged]) -> dict[str, Judged]:
    """Networks by a name unlike any other's: the end of a path, and the runtime, the precision, or how images are
    prepared, where these differ."""
    names, found = short_names([each.name for each in networks]), dict[str, Judged]()
    for each in networks:
        alike = [other for other in networks if other.name == each.name]
        parts = [names[each.name]]
        if len({other.classifier.runtime for other in alike}) > 1:
            parts.append(each.classifier.runtime)
        if len({other.classifier.precision for other in alike}) > 1:
            parts.append(each.classifier.precision)
        if len({other.given for other in alike}) > 1:
            parts.append(each.given or "as it says")
        found[", ".join(parts)] = each
    return found


def short_names(names: Sequence[str]) -> dict[str, str]:
    """By name, as much of the end of each path as tells it from the others; what is no path stays whole."""
    paths = [name for name in dict.fromkeys(names) if Path(name).exists()]
    ends = {name: Path(name).name or name for name in paths}
    others = {name: name for name in names if name not in ends}
    for length in range(2, max((len(Path(name).parts) for name in paths), default=0) + 1):
        if len({*ends.values(), *others.values()}) == len(ends) + len(others):
            return ends | others
        ends = {name: "/".join(Path(name).parts[-length:]) for name in paths}
    alike = len({*ends.values(), *others.values()}) < len(ends) + len(others)
    return {name: name for name in names} if alike else ends | others


def _result(
    label: str, network: Judged, matched: Matched, images: JudgedImages, found: Pass, speed: Speed | None
) -> ModelResult:
    answers, classifier = found.answers[label], network.classifier
    own = {output: images.classes[i] for i, output in enumerate(matched.outputs)}

    def named(output: int) -> str:
        """As the images' folders call it, where they do."""
        return own.get(output, matched.names[output])

    first, five, bins = top1(answers), top5(answers, classifier.num_classes), calibration(answers)
    cells = [ConfusionCell(named(cell.truth), named(cell.predicted), cell.images) for cell in confusion(answers)]
    sources = images.images.sources
    return ModelResult(
        label=label,
        model=network.name,
        file=str(network.file) if network.file else None,
        runtime=classifier.runtime,
        precision=classifier.precision,
        preprocess=_words(network),
        given=network.given,
        resolution=classifier.preprocess.size,
        classes=classifier.num_classes,
        matched=matched.how,
        top1=first.percent,
        top1_ci=first.ci,
        top5=five.percent if five else None,
        top5_ci=five.ci if five else None,
        images=first.images,
        ece=calibration_error(bins),
        calibration=bins,
        per_class=[
            ClassResult(named(output), share.images, share.correct, share.percent, share.ci)
            for output, share in by_class(answers).items()
        ],
        confusion=sorted(cells, key=lambda cell: (cell.truth == cell.predicted, -cell.images)),
        mistakes=[
            Mistake(
                str(sources[found.kept[i]]),
                named(int(answers.truth[i])),
                named(int(answers.predicted[i])),
                round(float(answers.confidence[i]), 6),
                round(float(answers.truth_confidence[i]), 6),
                found.kept[i],
            )
            for i in answers.mistakes()
        ],
        speed=speed,
    )


def _words(network: Judged) -> str:
    how, classifier = network.classifier.preprocess, network.classifier
    inside = "; in the file" if isinstance(classifier, OnnxFile) and classifier.in_graph else ""
    return f"{how.size} px of {how.resize}, {how.pixels}{inside}"


def _notes(
    networks: Mapping[str, Judged], matched: Mapping[str, Matched], images: JudgedImages, found: Pass
) -> list[str]:
    """What a reader of the figures has to know."""
    notes = [_sentence(line) for line in images.notes]
    if line := skipped_line([found]):
        notes.append(_sentence(line))
    names, told = short_names([each.name for each in networks.values()]), dict[str, list[str]]()
    for label, network in networks.items():
        notes += map(_sentence, network.classifier.notes)
        outputs, has, how = network.classifier.num_classes, len(images.classes), matched[label].how
        lines = [f"top-1 is the first of all {outputs:,} classes; the images are of {has:,} of them"] * (outputs > has)
        lines += [f"class folders are matched {how}"] * bool(how)
        if small := found.small[label]:
            side = network.classifier.preprocess.size
            lines.append(f"{small:,} of {counted(len(found.kept), 'image')} are smaller than {side} px, and enlarged")
        for line in lines:
            told.setdefault(line, []).append(names[network.name])
        if chance := guessing(top1(found.answers[label]).ci, outputs):
            told.setdefault(chance, []).append(label)
    notes += [f"{listed(dict.fromkeys(whose))}: {line}." for line, whose in told.items()]
    ways: dict[tuple[str, str, str], list[str]] = {}
    for label, network in networks.items():
        ways.setdefault(network.as_run, []).append(label)
    for labels in ways.values():
        if len(labels) > 1:
            best = max(labels, key=lambda label: found.answers[label].right.mean())
            notes.append(
                f"Of several ways to prepare images the best is chosen by these images: {best}. Its accuracy may be a "
                "little too high; who made the file knows which way is right."
            )
    return list(dict.fromkeys(notes))


def _sentence(line: str) -> str:
    """With a full stop; a name that begins it stays as it is."""
    begin, _, rest = line.partition(" ")
    return f"{begin.capitalize() if begin.isalpha() and begin.islower() else begin} {rest}."

"""Tables and text at every width of a terminal, and in pipes."""

import io

import pytest
from rich.console import Console

from nas.report.tables import Column, console_of, print_table, prose

COLUMNS = (
    Column("network", label=True),
    Column("role", label=True, drop=3),
    Column("estimated top-1"),
    Column("ms"),
    Column("95% of ms", drop=1),
    Column("img/s", drop=2),
    Column("published"),
)
ROWS = (
    ("trial 12 (efficientvit)", "winner", "36.8 +- 2.1", "1.423", "1.401..1.446", "704.1", ""),
    ("timm/mobilenetv3_small_050.lamb_in1k", "over 1.5 ms", "", "1.622", "1.600..1.641", "604.9", ""),
)


def terminal(width: int) -> Console:
    return Console(width=width, force_terminal=True, color_system=None, file=io.StringIO(), markup=False)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_table_cuts_no_figure(width):
    console = terminal(width)
    print_table(console, COLUMNS, ROWS)
    text = console.file.getvalue()
    table, _, below = text.partition("Columns left out")
    left_out = " ".join(below.split()).partition(": ")[2].partition(";")[0].split(", ")
    assert "…" not in text
    for column, *figures in zip(COLUMNS, *ROWS, strict=True):
        if not column.label and any(figures):
            whole = all(figure in table for figure in figures)
            assert whole != (column.name in left_out)
    if width >= 40:
        assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert "published" not in text


def test_columns_are_left_out_by_their_rank():
    told = []
    for width in (120, 70, 60, 50, 40):
        console = terminal(width)
        print_table(console, COLUMNS, ROWS, "bench.csv has them")
        told.append(" ".join(console.file.getvalue().partition("Columns left out")[2].split()))
    assert told[0] == ""
    assert told[1:] == [
        "",
        "at 60 columns: role; bench.csv has them.",
        "at 50 columns: role, img/s; bench.csv has them.",
        "at 40 columns: role, 95% of ms, img/s; bench.csv has them.",
    ]


def test_a_pipe_gets_everything_in_one_line_each(capsys):
    print_table(console_of(), COLUMNS, ROWS)
    prose(console_of(), "word " * 100)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].split() == [*" ".join(ROWS[1]).split()]


def test_text_is_wrapped_between_words_and_paths_are_kept_whole():
    console = terminal(40)
    prose(
        console,
        "the network is written to /home/user/some/quite/long/folder/of/runs/best/model.onnx, --train-threads 2",
    )
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "the network is written to",
        "/home/user/some/quite/long/folder/of/runs/best/model.onnx,",
        "--train-threads 2",
    ]


def test_text_in_brackets_is_printed_as_it_is(capsys):
    console_of().print("runs[test]/report.html [/x]")
    prose(console_of(), "runs[test]/report.html [/x]")
    assert capsys.readouterr().out == "runs[test]/report.html [/x]\n" * 2

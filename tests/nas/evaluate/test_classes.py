"""Class folders are matched to a network's outputs by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from nas.errors import UserError
from nas.evaluate.classes import match, read_labels

INFO = ImageNetInfo()
DESCRIBED = [INFO.index_to_description(i) for i in range(1000)]


def test_the_order_of_folders_says_nothing() -> None:
    found = match(["cat", "emu"], ["emu", "dog", "cat"], 3, "net")
    assert found.outputs == (2, 0)
    assert found.names == ("emu", "dog", "cat")
    assert not found.how


def test_accents_are_one_letter_or_two() -> None:
    assert match(["e\u0301mu"], ["\u00e9mu", "cat"], 2, "net").outputs == (0,)


def test_what_no_text_can_hold_is_as_a_card_has_it() -> None:
    assert match(["caf\udce9"], ["caf\ufffd", "cat"], 2, "net").outputs == (0,)


def test_a_class_that_the_network_does_not_know() -> None:
    with pytest.raises(UserError, match=r"net does not know yak of the 2 classes of the images; its 2 are cat, emu"):
        match(["cat", "yak"], ["cat", "emu"], 2, "net")
    with pytest.raises(UserError, match="rename cat to Cat, EMU to emu"):
        match(["cat", "EMU"], ["Cat", "emu"], 2, "net")
    with pytest.raises(UserError, match=r"does not know 'emu ' .* rename 'emu ' to emu"):
        match(["cat", "emu "], ["cat", "emu"], 2, "net")


def test_equal_numbers_of_classes_are_no_match() -> None:
    with pytest.raises(UserError, match=r"net does not say what its 2 classes are called .*: give their names"):
        match(["cat", "dog"], None, 2, "net")


def test_two_outputs_of_one_name() -> None:
    with pytest.raises(UserError, match=r"does not know dog .* cat stands there more than once"):
        match(["cat", "dog"], ["cat", "cat"], 2, "net")
    with pytest.raises(UserError, match="several outputs called cat"):
        match(["cat"], ["cat", "cat"], 2, "net")
    with pytest.raises(UserError, match="its 2 are '', '': '' stands there more than once"):
        match(["cat"], ["", ""], 2, "net")


def test_folders_that_are_numbers() -> None:
    found = match(["0", "007", "12"], None, 13, "net")
    assert found.outputs == (0, 7, 12)
    assert "by number" in found.how
    with pytest.raises(UserError, match="does not say"):
        match(["0", "13"], None, 13, "net")
    with pytest.raises(UserError, match="does not know"):
        match(["0", "1"], ["cat", "dog"], 2, "net")


@pytest.mark.parametrize("names", [None, DESCRIBED])
def test_folders_that_are_wordnet_ids(names: list[str] | None) -> None:
    found = match(["n01443537", "n01440764"], names, 1000, "net")
    assert found.outputs == (1, 0)
    assert found.names[0] == "tench, Tinca tinca"
    assert "WordNet" in found.how


def test_wordnet_ids_of_names_in_another_order() -> None:
    with pytest.raises(UserError, match="does not know n01440764"):
        match(["n01440764"], DESCRIBED[::-1], 1000, "net")


def test_labels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("cat\ndog\n")
    assert read_labels(path) == ["cat", "dog"]
    path.write_bytes("\ufeffélan\r\ndog\r\n\r\n".encode())  # as Windows writes it
    assert read_labels(path) == ["élan", "dog"]
    path.write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        read_labels(path)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_labels(path)
    with pytest.raises(UserError, match="No such file"):
        read_labels(tmp_path / "none.txt")

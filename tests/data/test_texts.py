import json

import pytest

from sparsekern.data import package_docstrings, read_texts, stdlib_docstrings
from sparsekern.data.texts import _docstrings_of


def test_stdlib_docstrings_are_a_corpus():
    docstrings = stdlib_docstrings()
    assert len(docstrings) > 5_000
    assert sum(map(len, docstrings)) > 1_000_000
    assert len(set(docstrings)) == len(docstrings)
    assert min(map(len, docstrings)) >= 20


def test_docstrings_come_cleaned_and_in_source_order(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        '"""The module."""\n'
        "class A:\n"
        '    """The class.\n\n    Indented.\n    """\n'
        "    def f(self):\n"
        '        r"""A method \\d."""\n'
        '        def g(): "A function in a method."\n'
        'async def h(): """A coroutine."""\n'
    )
    assert list(_docstrings_of(source)) == [
        "The module.",
        "The class.\n\nIndented.",
        "A method \\d.",
        "A function in a method.",
        "A coroutine.",
    ]


def test_docstrings_are_found_in_every_branch(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "if x:\n    def f(): 'one'\n"
        "elif y:\n    def f(): 'two'\n"
        "else:\n    def f(): 'three'\n"
        "try:\n    def f(): 'four'\n"
        "except A:\n    def f(): 'five'\n"
        "else:\n    def f(): 'six'\n"
        "finally:\n    def f(): 'seven'\n"
        "match x:\n    case 1:\n        def f(): 'eight'\n"
        "    case _:\n        with y:\n            @g(lambda: 'nothing')\n            class B: 'nine'\n"
    )
    assert list(_docstrings_of(source)) == ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_source_that_does_not_parse_is_skipped(tmp_path):
    source = tmp_path / "module.py"
    source.write_bytes(b'"""Text."""\nprint "two"\n')
    assert list(_docstrings_of(source)) == []


def test_read_texts_finds_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("in markdown")
    (tmp_path / "a.txt").write_text("in text")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    lines = [json.dumps({"text": f"line {n} \u2028 more"}, ensure_ascii=False) for n in range(2)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_texts([tmp_path]) == ["in text", "line 0 \u2028 more", "line 1 \u2028 more", "in markdown"]
    assert read_texts([tmp_path / "sub" / "b.md", tmp_path / "a.txt"]) == ["in markdown", "in text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", r"a\.txt is empty"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ""}\n', r"a\.jsonl, line 2: .*empty"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"}\n', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1: not a JSON object"),
        ("a.csv", b"x", r"a\.csv is not a text file"),
    ],
)
def test_read_texts_names_the_bad_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts([tmp_path / name])


def test_read_texts_with_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="no text found"):
        read_texts([tmp_path])
    with pytest.raises(ValueError, match="does not exist"):
        read_texts([tmp_path / "missing"])


def test_docstrings_of_a_package_come_with_their_files_and_without_tests(tmp_path, monkeypatch):
    package = tmp_path / "parcel"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text('"""A parcel of many functions."""\n')
    (package / "lid.py").write_text('"""A parcel of many functions."""\ndef f(): """Lifts the lid and closes it."""\n')
    (package / "tests" / "test_lid.py").write_text('"""A test, which is nobody\'s documentation."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert package_docstrings("parcel") == [
        ("parcel/__init__.py", "A parcel of many functions."),
        ("parcel/lid.py", "Lifts the lid and closes it."),
    ]
    with pytest.raises(ValueError, match="package 'no_such_parcel' is not installed"):
        package_docstrings("no_such_parcel")

"""Sources: what is read from each kind of place, and what is said when it cannot be."""

import csv
import gzip
import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retnet.data import DataSpec
from retnet.data.sources import open_source, open_validation, reopen_source
from retnet.errors import UserError

SpecFor = Callable[..., DataSpec]
TEXTS = ["first\nwith two lines", "zweite 漢字 🙂", 'third, "quoted"', "x" * 200_000]


def write_rows(path: Path, field: str = "text", texts: list[str] = TEXTS) -> Path:
    rows = [{"id": number, field: text} for number, text in enumerate(texts)]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["id", field])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def documents(spec: DataSpec) -> list[str]:
    source = open_source(spec)
    found = list(source.documents())
    record = json.loads(json.dumps(source.to_record()))
    assert list(reopen_source(record).documents()) == found
    return found


def test_python_stdlib(spec_for: SpecFor) -> None:
    found = documents(spec_for("python-stdlib"))
    folder = Path(sysconfig.get_path("stdlib"))
    assert (folder / "argparse.py").read_text(encoding="utf-8") in found
    for left_out in ("encodings/aliases.py", "pydoc_data/topics.py"):
        assert (folder / left_out).read_text(encoding="utf-8") not in found
    assert 200 < len(found) < 1000
    assert 4e6 < sum(map(len, found)) < 20e6


def test_python_stdlib_is_sorted_and_without_tests(
    tmp_path: Path, spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.py", "a/z.py", "a.py", "test/t.py", "a/tests/t.py", "site-packages/s/s.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é".encode("latin-1"))
    (tmp_path / "data.txt").write_text("no code")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    latin = "# -*- coding: latin-1 -*-\n# é"
    assert documents(spec_for("python-stdlib")) == ["a.py", "a/z.py", "b.py", latin]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_a_row_is_a_document(tmp_path: Path, spec_for: SpecFor, name: str, field: str) -> None:
    path = write_rows(tmp_path / name, field)
    assert documents(spec_for(path, text_field=field)) == TEXTS
    with pytest.raises(UserError, match=rf"data\.text_field \(body\).*rows.*\(id, {field}\)"):
        documents(spec_for(path, text_field="body"))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
def test_a_text_file_is_a_document_byte_for_byte(
    tmp_path: Path, spec_for: SpecFor, name: str
) -> None:
    (tmp_path / name).write_bytes(b"one\r\ntwo\n\n" + "drei 漢".encode())
    assert documents(spec_for(tmp_path / name)) == ["one\r\ntwo\n\ndrei 漢"]


def test_byte_order_marks_are_dropped(tmp_path: Path, spec_for: SpecFor) -> None:
    mark = b"\xef\xbb\xbf"
    for name, content in (("a.txt", b"t"), ("b.jsonl", b'{"text": "t"}'), ("c.csv", b"text\nt\n")):
        (tmp_path / name).write_bytes(mark + content)
        assert documents(spec_for(tmp_path / name)) == ["t"]


def test_folder_and_glob(
    tmp_path: Path, spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", "image.png", ".git/d.txt", "test.txt"):
        (tmp_path / name).write_text(name)
    assert documents(spec_for(tmp_path)) == ["a.md", "b.txt", "sub/c.txt", "test.txt"]
    assert documents(spec_for(tmp_path / "**/*.txt")) == ["b.txt", "sub/c.txt", "test.txt"]
    monkeypatch.chdir(tmp_path)
    assert documents(spec_for("./sub/*.txt")) == ["sub/c.txt"]
    with pytest.raises(UserError, match=r"matches image\.png, whose suffix is not known"):
        open_source(spec_for("*"))


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "a[1].txt").write_text("found")
    assert documents(spec_for(tmp_path / "a[1].txt")) == ["found"]


@pytest.mark.parametrize("target", ["5f3ab1", "rows.csv"])
def test_the_name_of_a_link_decides_what_it_is(
    tmp_path: Path, spec_for: SpecFor, target: str
) -> None:
    (tmp_path / target).write_text("text\none\n")
    (tmp_path / "a.txt").symlink_to(target)
    assert documents(spec_for(tmp_path / "a.txt")) == ["text\none\n"]


def test_one_huge_line(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "line.txt").write_text("word " * 400_000)
    (found,) = documents(spec_for(tmp_path / "line.txt"))
    assert len(found) == 2_000_000


def test_fingerprint_goes_by_content(tmp_path: Path, spec_for: SpecFor) -> None:
    """Same size and same modification time: only the content differs."""
    path = tmp_path / "a.txt"
    path.write_text("before")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    source = open_source(spec_for(path))
    before = source.fingerprint()
    assert source.fingerprint() == before
    path.write_text("after!")
    os.utime(path, ns=times)
    assert source.fingerprint() != before


def test_validation_by_path(tmp_path: Path, spec_for: SpecFor) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    spec = spec_for(tmp_path / "a.txt", validation=str(tmp_path / "b.txt"))
    validation = open_validation(spec, open_source(spec))
    assert validation is not None
    assert list(validation.documents()) == ["b.txt"]


def test_text_field_without_effect_is_said(
    tmp_path: Path, spec_for: SpecFor, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("x")
    open_source(spec_for(tmp_path / "a.txt", text_field="body"))
    assert "data.text_field (body) has no effect" in caplog.text


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BAD_FILES = {
    "latin.txt": (b"caf\xe9 au lait", r"latin\.txt is not UTF-8.*offset 3"),
    "far.txt": (b"a" * 3_000_000 + b"\xff", r"offset 3000000"),
    "cut.txt": ("漢".encode()[:2], r"offset 0"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', r"offset 24"),
    "latin.jsonl.gz": (gzip.compress(b'{"text": "a"}\n\xe9'), r"offset 14 of the unpacked text"),
    "latin.csv": (b"text\na\n\xe9\n", r"offset 7"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', r"bad\.jsonl line 2 is not JSON"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl line 1 holds list, not an object"),
    "number.jsonl": (b'{"text": 5}\n', r"line 1 holds int, not text"),
    "no.jsonl.gz": (b"not compressed", r"no\.jsonl\.gz is damaged"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], r"cut\.jsonl\.gz is damaged"),
    "no.parquet": (b"PAR1", r"no\.parquet is not a readable parquet file"),
    "quote.csv": (
        b'text\na\n"b\n"\n"a"b\n',
        r"quote\.csv is not valid CSV .*: repair the row that begins at line 5",
    ),
    "open.csv": (b'text\na\n"b\nc\n', r"open\.csv is not valid CSV .* begins at line 3"),
    "more.csv": (
        b'id,text\n0,"a\nb"\n\n1,hello, world\n',
        r"more\.csv line 5 has 3 fields and the "
        r"header 2: put quotes around text with commas",
    ),
    "less.csv": (b"text,id\na,1\nb\n", r"less\.csv line 3 has 1 fields and the header 2"),
    "empty.csv": (b"", r"data\.text_field \(text\).*\(none\)"),
    "pointer.txt": (POINTER, r"pointer\.txt is a Git LFS pointer"),
    "pointer.jsonl.gz": (POINTER, r"pointer\.jsonl\.gz is a Git LFS pointer"),
    "pointer.parquet": (POINTER, r"pointer\.parquet is a Git LFS pointer.* git lfs pull"),
    "a.pdf": (b"x", r"suffix that is not known \(\.pdf\).*\.txt, \.md"),
    "noname": (b"x", r"suffix that is not known \(none\)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_read(tmp_path: Path, spec_for: SpecFor, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        documents(spec_for(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_text_about_git_lfs_is_text(tmp_path: Path, spec_for: SpecFor) -> None:
    text = POINTER.decode() + "This is what a pointer looks like. " * 40
    (tmp_path / "a.txt").write_text(text)
    assert documents(spec_for(tmp_path / "a.txt")) == [text]


def test_a_row_of_many_fields(tmp_path: Path, spec_for: SpecFor) -> None:
    """Their names, a hundred thousand or one as long, were the message."""
    row = {f"{number}" + "x" * 100_000 * (number == 0): 1 for number in range(1000)}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    words = r"a\.jsonl line 1: .* there are \(0x{39}\.\.\., 1, 2, .*, 19, and 980 more\)$"
    with pytest.raises(UserError, match=words):
        documents(spec_for(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_that_no_memory_holds(
    tmp_path: Path, spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Ten megabytes can be packed that unpack to as many gigabytes."""
    monkeypatch.setattr("retnet.data.readers.MAX_LINE", 100)
    fits, long = (json.dumps({"text": "x" * number}) for number in (87, 89))
    pack = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(pack(f"{fits}\n{fits}\n".encode()))
    assert documents(spec_for(tmp_path / name)) == ["x" * 87] * 2
    (tmp_path / name).write_bytes(pack(f"{fits}\n{long}\n".encode()))
    with pytest.raises(UserError, match=rf"{name} line 2 has more than 100 bytes: spread its text"):
        documents(spec_for(tmp_path / name))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([10**15], pa.timestamp("ms")),  # a year that Python does not know
        pa.array([["a"]]),
        pa.array([{"text": "a"}]),
        pa.array([b"a"]),
    ],
)
def test_a_parquet_column_that_is_no_text(tmp_path: Path, spec_for: SpecFor, column) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"data\.text_field \(text\) of .*a\.parquet holds .*, not t"
    ):
        documents(spec_for(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "column",
    [pa.array(["a"], pa.large_string()), pa.array(["a"]).dictionary_encode(), pa.array([None])],
)
def test_all_kinds_of_text_in_parquet(tmp_path: Path, spec_for: SpecFor, column) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert documents(spec_for(tmp_path / "a.parquet")) == [column[0].as_py() or ""]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_two_columns_of_one_name(tmp_path: Path, spec_for: SpecFor, name: str) -> None:
    """Of a .csv the last was read, of a .parquet the first."""
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"\(text\) of .*{name} is the name of 2 columns, and"):
        documents(spec_for(tmp_path / name))


def test_a_parquet_row_that_is_not_utf8(tmp_path: Path, spec_for: SpecFor) -> None:
    """The row is named: an offset in the container would lead nowhere."""
    texts = pa.array([b"a"] * 1500 + [b"caf\xe9"])
    column = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    words = r"a\.parquet row 1501 is not UTF-8 text in data\.text_field \(text\), from byte 3 of"
    with pytest.raises(UserError, match=words):
        documents(spec_for(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "missing.txt"}, r"data\.source \(missing\.txt\) does not exist"),
        ({"source": "/no/such/place"}, r"data\.source \(/no/such/place\) does not exist"),
        ({"source": "none*.txt"}, r"data\.source \(none\*\.txt\) matches no file"),
        ({"hub_config": "x"}, r"data\.hub_config \(x\) has no meaning"),
        ({"split": "test"}, r"data\.split \(test\) has no meaning"),
        ({"validation": "valid"}, r"data\.validation \(valid\) is no file, folder or glob"),
        ({"validation": "no.txt"}, r"data\.validation \(no\.txt\) does not exist"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, spec_for: SpecFor, options: dict[str, str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("x")
    spec = spec_for(**{"source": tmp_path / "a.txt", **options})
    with pytest.raises(UserError, match=message):
        open_validation(spec, open_source(spec))


def test_a_folder_without_text(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(UserError, match=r"is a folder without a file to read"):
        open_source(spec_for(tmp_path))


def test_a_parquet_column_whose_name_is_no_text(tmp_path: Path, spec_for: SpecFor) -> None:
    """Not the text of its rows, which could be converted."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "zzzz": [1]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"\xff\xfe\xfd\xfc"))
    words = r"a\.parquet is not a readable parquet file, the name of a column is not UTF-8"
    with pytest.raises(UserError, match=words):
        documents(spec_for(path))

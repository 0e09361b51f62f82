"""fsspec's view of a layer: chained URLs, listings, and what pandas and pyarrow read through it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference.blobs import estargz, link, tar_of

from estargz.errors import BlobError, VerificationError

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
from estargz.reading.filesystem import EstargzFileSystem  # noqa: E402

FILES = {"etc/os-release": b"ID=test\n", "usr/data/table.csv": b"a,b\n" + b"1,2\n" * 5000, "usr/data/empty": b""}


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    tar = tar_of(
        *FILES.items(),
        link("usr/data/same.csv", "usr/data/table.csv"),
        link("data", "usr/data", kind=b"2"),
        link("lost", "other/layer", kind=b"2"),
        ("usr/.wh.gone", b""),
    )
    path = tmp_path / "layer"
    path.write_bytes(estargz(tar, chunk_size=4000))
    return path


@pytest.fixture(autouse=True)
def registered() -> None:
    """As the entry point does it, where the package itself is not installed."""
    fsspec.register_implementation("estargz", EstargzFileSystem, clobber=True)


@pytest.mark.parametrize("chain", ["file://{}", "{}", "simplecache::file://{}", "blockcache::file://{}"])
def test_chained(layer: Path, chain: str) -> None:
    for name, content in FILES.items():
        with fsspec.open(f"estargz://{name}::" + chain.format(layer)) as file:
            assert file.read() == content


def test_memory_filesystem(layer: Path) -> None:
    fsspec.filesystem("memory").pipe("/layer", layer.read_bytes())
    with fsspec.open("estargz://data/same.csv::memory://layer", "rt") as file:
        assert file.readline() == "a,b\n"


def test_listings(layer: Path) -> None:
    fs = fsspec.filesystem("estargz", fo=str(layer))
    assert fs.ls("", detail=False) == ["data", "etc", "lost", "usr"]
    assert fs.ls("/usr/", detail=False) == ["usr/data"]
    assert fs.find("usr") == ["usr/data/empty", "usr/data/same.csv", "usr/data/table.csv"]
    assert fs.glob("**/*.csv") == ["usr/data/same.csv", "usr/data/table.csv"]  # nobody walks through links
    assert fs.read_block("etc/os-release", 3, 4) == b"test"
    assert fs.isdir("data")
    assert fs.isfile("data/table.csv")
    assert not fs.exists("usr/gone")
    assert fs.du("usr") == sum(len(data) for name, data in FILES.items() if name.startswith("usr")) + 20004
    found = fs.info("usr/data/same.csv")
    assert (found["size"], found["type"], found["nlink"]) == (20_004, "file", 2)
    assert fs.info("lost")["type"] == "link"
    assert (fs.info("data")["type"], fs.info("data")["destination"]) == ("link", "usr/data")
    assert [one["name"] for one in fs.ls("etc/os-release")] == ["etc/os-release"]
    assert fs.modified("etc/os-release").year >= 1970
    with pytest.raises(FileNotFoundError):
        fs.ls("nope")
    with pytest.raises(NotImplementedError):
        fs.open("etc/os-release", "wb")


def test_parts_of_files(layer: Path) -> None:
    fs = fsspec.filesystem("estargz", fo=str(layer))
    whole = FILES["usr/data/table.csv"]
    for start, end in [(None, None), (5000, 5100), (-10, None), (None, -3), (7, 7), (9, 2), (0, 10**9)]:
        assert fs.cat_file("usr/data/table.csv", start, end) == whole[start:end]
    assert fs.cat_ranges(["etc/os-release"] * 2, [0, 3], [2, 7]) == [b"ID", b"test"]
    assert fs.cat(["etc/os-release", "usr/data/empty"]) == {"etc/os-release": b"ID=test\n", "usr/data/empty": b""}


def test_links_to_directories_are_not_walked_through(tmp_path: Path) -> None:
    tar = tar_of(
        ("bin/tool", b""), link("bin/X11", ".", kind=b"2"), link("bin/Y", "../bin", kind=b"2"), link("bin/h", "no")
    )
    (tmp_path / "layer").write_bytes(estargz(tar))
    fs = fsspec.filesystem("estargz", fo=str(tmp_path / "layer"))
    assert fs.find("") == ["bin/X11", "bin/Y", "bin/h", "bin/tool"]
    assert [one["type"] for one in fs.ls("bin")] == ["link", "link", "other", "file"]
    assert fs.ls("bin/X11", detail=False) == ["bin/X11/X11", "bin/X11/Y", "bin/X11/h", "bin/X11/tool"]


def test_digest_is_demanded(layer: Path) -> None:
    with pytest.raises(VerificationError):
        fsspec.filesystem("estargz", fo=str(layer), toc_digest="sha256:" + "0" * 64)
    with pytest.raises(BlobError):
        fsspec.filesystem("estargz", fo=__file__)


def test_pickled(layer: Path) -> None:
    fs = fsspec.filesystem("estargz", fo=str(layer))
    assert pickle.loads(pickle.dumps(fs)).cat_file("etc/os-release") == FILES["etc/os-release"]
    file = pickle.loads(pickle.dumps(fsspec.open(f"estargz://etc/os-release::file://{layer}")))
    with file as opened:
        assert opened.read() == FILES["etc/os-release"]


def test_pandas_and_pyarrow(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    frame = pandas.DataFrame({"n": range(10_000), "text": [f"row {i}" for i in range(10_000)]})
    frame.to_parquet(tmp_path / "frame.parquet", row_group_size=1000)
    tar = tar_of(("d/frame.parquet", (tmp_path / "frame.parquet").read_bytes()), ("d/frame.csv", b"n\n1\n2\n"))
    (tmp_path / "layer").write_bytes(estargz(tar, chunk_size=10_000))
    target = f"file://{tmp_path}/layer"
    assert pandas.read_csv(f"estargz://d/frame.csv::{target}")["n"].tolist() == [1, 2]
    assert pandas.read_parquet(f"estargz://d/frame.parquet::{target}").equals(frame)
    fs: Any = fsspec.filesystem("estargz", fo=str(tmp_path / "layer"))
    assert parquet.read_table("d/frame.parquet", columns=["n"], filesystem=fs).num_rows == 10_000
    assert parquet.ParquetFile(fs.open("d/frame.parquet")).read_row_group(3).num_rows == 1000


def test_importing_the_package_does_not_import_fsspec() -> None:
    code = "import sys, estargz; estargz.open; assert 'fsspec' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

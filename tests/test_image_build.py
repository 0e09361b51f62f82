"""Images put together: what their documents say, where they are written, and the commands for it."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sample_images as images
from faulty_registry import Pauses, cutting_proxy, faulty_registry
from registry import registry
from sample_images import FILES, image, several_platforms, sha256, tar_of, write_layout
from test_image_convert import TOC_DIGEST, inflated, read_blob, read_json

from estargz.errors import ChangedError, ImageError, SourceError, UploadBrokenError, UsageError
from estargz.image.export import Exported
from estargz.image.image import Image
from estargz.image.layers import NewLayer
from estargz.image.progress import Event
from estargz.image.variants import VariantStore
from estargz.registry.client import Registries
from estargz.writing.pool import Pool

MIB = 1 << 20


def tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        os.utime(folder / name, (1_700_000_000, 1_700_000_000))
    return folder


def exported(
    image: Image, layout: Path, line: str = "", **options: Any
) -> tuple[Exported, dict[str, Any], dict[str, Any]]:
    """What an image becomes in a layout: its manifest and its configuration."""
    done = image.export(f"type=oci,tar=false,dest={layout}{line}", **options)
    assert done.descriptor is not None
    manifest = read_json(layout, done.descriptor.digest)
    return done, manifest, read_json(layout, manifest["config"]["digest"])


def names_in(layout: Path, layer: dict[str, Any]) -> set[str]:
    stream = inflated(read_blob(layout, layer["digest"]), layer["mediaType"])
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        return {member.name for member in tar}


# --------------------------------------------------------------------------------------------------------------------
# documents


def test_a_new_image(scratch: Path) -> None:
    one, two = tree(scratch / "one", {"bin/app": b"#!"}), tree(scratch / "two", {"etc/app.conf": b"a=b"})
    made = (
        Image.new("linux/arm64/v8")
        .append(one)
        .append(two, created_by="COPY two /")
        .config(
            entrypoint=["/bin/app"],
            cmd=["-v"],
            env={"PATH": "/bin", "A": "1=2"},
            workdir="/srv",
            user="7:8",
            labels={"org.example": "x"},
            exposed_ports=["80", "53/udp"],
            volumes=["/data"],
            stop_signal="SIGINT",
        )
    )
    _, manifest, config = exported(made, scratch / "out", ",compression=gzip,name=example.com/app:1")
    assert (config["os"], config["architecture"]) == ("linux", "arm64")
    assert config["config"] == {
        "Entrypoint": ["/bin/app"],
        "Cmd": ["-v"],
        "Env": ["PATH=/bin", "A=1=2"],
        "Labels": {"org.example": "x"},
        "WorkingDir": "/srv",
        "User": "7:8",
        "StopSignal": "SIGINT",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Volumes": {"/data": {}},
    }
    assert [step["created_by"] for step in config["history"]] == ["estargz", "COPY two /"]
    diff_ids = [sha256(gzip.decompress(read_blob(scratch / "out", layer["digest"]))) for layer in manifest["layers"]]
    assert config["rootfs"] == {"type": "layers", "diff_ids": diff_ids}
    assert [names_in(scratch / "out", layer) for layer in manifest["layers"]] == [
        {"bin", "bin/app"},
        {"etc", "etc/app.conf"},
    ]


def test_time_is_given_or_none(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"a"}))
    _, _, config = exported(made, scratch / "first")
    assert config["created"] == config["history"][0]["created"] == "1970-01-01T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    _, manifest, config = exported(made, scratch / "second")
    assert config["created"] == "2020-09-13T12:26:40Z"
    stream = inflated(read_blob(scratch / "second", manifest["layers"][0]["digest"]), "gzip")
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        assert {member.mtime for member in tar} == {1_600_000_000}


def test_a_tars_times_change_only_when_asked_for(scratch: Path) -> None:
    source = scratch / "layer.tar"
    with tarfile.open(source, "w") as tar:
        info = tarfile.TarInfo("a")
        info.mtime = 1_700_000_000
        tar.addfile(info)
    made = Image.new("linux/amd64").append(source)
    line = ",compression=uncompressed,source-date-epoch=1600000000"
    _, manifest, _ = exported(made, scratch / "kept", line)
    assert manifest["layers"][0]["digest"] == sha256(source.read_bytes())
    _, manifest, _ = exported(made, scratch / "bound", f"{line},rewrite-timestamp=true")
    with tarfile.open(fileobj=io.BytesIO(read_blob(scratch / "bound", manifest["layers"][0]["digest"]))) as tar:
        assert tar.next().mtime == 1_600_000_000  # type: ignore[union-attr]


def test_the_same_again(scratch: Path) -> None:
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"a" * 10_000, "b/c": b"c"}))
    digests = {
        exported(made, scratch / str(number), ",compression=estargz,name=a/b:1")[0].descriptor.digest
        for number in range(3)  # type: ignore[union-attr]
    }
    assert len(digests) == 1


@pytest.mark.parametrize("force", [False, True])
def test_the_base_is_kept_unless_forced(force: bool, scratch: Path) -> None:
    base = image()
    write_layout(scratch / "base", base, "v1")
    with Image.open(f"oci:{scratch}/base:v1") as opened:
        made = opened.append(tree(scratch / "one", {"a": b"a"})).config(env={"PATH": "/usr/bin", "B": "2"})
        line = f",compression=estargz,force-compression={str(force).lower()}"
        done, manifest, config = exported(made, scratch / "out", line)
    assert [layer.action for layer in done.layers] == (["converted"] * 2 if force else ["copied"] * 2) + ["built"]
    stays = [layer["digest"] for layer in base.document["layers"]]
    assert ([layer["digest"] for layer in manifest["layers"][:2]] == stays) is not force
    assert TOC_DIGEST in manifest["layers"][2]["annotations"]
    assert config["config"] == {"Cmd": ["/usr/big"], "Env": ["PATH=/usr/bin", "B=2"]}
    assert [step["created_by"] for step in config["history"]] == ["layer 0", "layer 1", "estargz"]
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        assert sha256(inflated(read_blob(scratch / "out", layer["digest"]), layer["mediaType"])) == diff_id


def test_an_entrypoint_drops_the_bases_command(scratch: Path) -> None:
    write_layout(scratch / "base", image(), "v1")
    with Image.open(f"oci:{scratch}/base:v1") as opened:
        _, _, config = exported(opened.config(entrypoint=["/x"]), scratch / "out")
    assert config["config"]["Entrypoint"] == ["/x"]
    assert "Cmd" not in config["config"]


def test_a_platform_of_several(scratch: Path) -> None:
    write_layout(scratch / "base", several_platforms(), "v1")
    with Image.open(f"oci:{scratch}/base:v1", platform="linux/arm64") as opened:
        assert exported(opened, scratch / "out")[2]["architecture"] == "arm64"


def test_one_beginning_two_images(scratch: Path) -> None:
    begun = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"a"}))
    _, first, _ = exported(begun.append(tree(scratch / "two", {"b": b"b"})), scratch / "first")
    _, second, _ = exported(begun.append(tree(scratch / "three", {"c": b"c"})), scratch / "second")
    assert first["layers"][0] == second["layers"][0]
    assert (len(first["layers"]), len(second["layers"])) == (2, 2)


def test_annotations(scratch: Path) -> None:
    line = ",annotation.a=1,annotation-manifest[linux/amd64].b=2,annotation[linux/arm64].c=3,annotation-manifest-descriptor.d=4"
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"a"}))
    _, manifest, _ = exported(made, scratch / "out", line)
    assert manifest["annotations"] == {"a": "1", "b": "2"}
    (entry,) = json.loads((scratch / "out/index.json").read_text())["manifests"]
    assert entry["annotations"]["d"] == "4"
    with pytest.raises(UsageError, match="annotation-index"):
        exported(made, scratch / "other", ",annotation-index.e=5")


def test_dockers_types(scratch: Path) -> None:
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"a"}))
    _, manifest, _ = exported(made, scratch / "out", ",oci-mediatypes=false")
    assert manifest["mediaType"] == images.DOCKER_TYPES["manifest"]
    assert manifest["config"]["mediaType"] == images.DOCKER_TYPES["config"]
    assert [layer["mediaType"] for layer in manifest["layers"]] == [images.DOCKER_TYPES["gzip"]]


# --------------------------------------------------------------------------------------------------------------------
# sources


def test_whiteouts_of_a_changed_tree(scratch: Path) -> None:
    lower = tree(scratch / "lower", {"stays": b"1", "goes": b"2"})
    upper = tree(scratch / "upper", {"stays": b"1", "comes": b"3"})
    _, manifest, _ = exported(Image.new("linux/amd64").append(upper, lower=lower), scratch / "out")
    assert names_in(scratch / "out", manifest["layers"][0]) == {".wh.goes", "comes"}


def test_a_tar_is_kept_to_the_byte(scratch: Path) -> None:
    (scratch / "layer.tar.gz").write_bytes(gzip.compress(tar_of(FILES[0])))
    made = Image.new("linux/amd64").append(scratch / "layer.tar.gz").append(io.BytesIO(tar_of(FILES[1])))
    _, manifest, _ = exported(made, scratch / "out", ",compression=uncompressed")
    assert [layer["digest"] for layer in manifest["layers"]] == [sha256(tar_of(files)) for files in FILES]


def test_the_cache_knows_trees_and_tars(scratch: Path) -> None:
    source = tree(scratch / "one", {"a": b"a" * 10_000})
    (scratch / "layer.tar").write_bytes(tar_of(FILES[0]))
    made = Image.new("linux/amd64").append(source).append(scratch / "layer.tar")
    with VariantStore(scratch / "cache") as cache:
        first, _, _ = exported(made, scratch / "first", ",compression=estargz", cache=cache)
        second, _, _ = exported(made, scratch / "second", ",compression=estargz", cache=cache)
        assert [layer.action for layer in second.layers] == ["reused", "reused"]
        assert first.descriptor == second.descriptor
        (source / "a").write_bytes(b"b" * 10_000)
        third, _, _ = exported(made, scratch / "third", ",compression=estargz", cache=cache)
        assert [layer.action for layer in third.layers] == ["built", "reused"]
        without, _, _ = exported(
            Image.new("linux/amd64").append(source, landmark=False),
            scratch / "fourth",
            ",compression=estargz",
            cache=cache,
        )
        assert [layer.action for layer in without.layers] == ["built"]


class Slow:
    """A tar that takes its time to come."""

    def __init__(self, tar: bytes, released: threading.Event) -> None:
        self._tar, self._released = io.BytesIO(tar), released

    def read(self, size: int, /) -> bytes:
        if self._tar.tell() > 0:
            assert self._released.wait(60)
        return self._tar.read(min(size, 512))


def test_small_layers_do_not_wait_for_large_ones(scratch: Path) -> None:
    """All of them come first in the list, and no more threads compute than one."""
    released = threading.Event()
    finished: list[str] = []

    def report(event: Event) -> None:
        if event.finished:
            finished.append(event.name)
            if len(finished) == 3:
                released.set()

    made = Image.new("linux/amd64").append(Slow(tar_of(FILES[1]), released))
    for name in ("one", "two", "three"):
        made = made.append(tree(scratch / name, {name: b"1" * 100_000}))
    exported(made, scratch / "out", ",compression=estargz", pool=Pool(1), report=report)
    assert {Path(name).name for name in finished[:3]} == {"one", "two", "three"}


def test_a_tree_that_changes_between_two_looks(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was hashed to be looked up is not what was built: nothing of it must be found later."""
    source = tree(scratch / "one", {"a": b"one"})
    original = NewLayer.build

    def build(self: NewLayer, dest: Any, **options: Any) -> Any:
        tree(scratch / "one", {"a": b"two"})
        return original(self, dest, **options)

    with VariantStore(scratch / "cache") as cache:
        monkeypatch.setattr(NewLayer, "build", build)
        with pytest.raises(ChangedError, match="one: was changed while it was read"):
            exported(Image.new("linux/amd64").append(source), scratch / "first", ",compression=estargz", cache=cache)
        monkeypatch.undo()
        assert cache.usage() == []


@pytest.mark.parametrize("kind", ["fifo", "pipe"])
def test_a_pipe_is_not_waited_for_when_another_layer_fails(kind: str, scratch: Path) -> None:
    os.mkfifo(scratch / "fifo")
    reading, writing = os.pipe()
    with io.FileIO(reading, "rb") as pipe, io.FileIO(writing, "wb"):
        made = Image.new("linux/amd64").append(scratch / "fifo" if kind == "fifo" else pipe)
        started = time.monotonic()
        with pytest.raises(SourceError, match="nowhere"):
            exported(made.append(scratch / "nowhere"), scratch / "out")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("number", range(8))
def test_a_directory_that_cannot_be_examined_once(number: int, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not taken for a pipe."""
    folder, examine, asked = scratch / "tree", os.stat, iter(range(1000))
    folder.mkdir()

    def fails_once(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if path == folder and next(asked) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
        return examine(path, *arguments, **options)

    with monkeypatch.context() as patched, contextlib.suppress(SourceError):
        patched.setattr(os, "stat", fails_once)
        exported(Image.new("linux/amd64").append(folder), scratch / "out")


def test_a_layer_through_a_fifo(scratch: Path) -> None:
    os.mkfifo(scratch / "fifo")
    writer = threading.Thread(target=(scratch / "fifo").write_bytes, args=(tar_of(FILES[1]),))
    writer.start()
    _, manifest, _ = exported(
        Image.new("linux/amd64").append(scratch / "fifo"), scratch / "out", ",compression=uncompressed"
    )
    writer.join()
    assert manifest["layers"][0]["digest"] == sha256(tar_of(FILES[1]))


def test_a_small_tree_comes_before_eight_pipes(scratch: Path) -> None:
    """All lanes could be taken by what nobody knows the size of."""
    made = Image.new("linux/amd64")
    released = threading.Event()
    for _ in range(10):
        made = made.append(Slow(tar_of(FILES[1]), released))
    made = made.append(tree(scratch / "small", {"a": b"1"}))
    exported(made, scratch / "out", report=lambda event: event.finished and released.set())


def test_a_platform_that_changes_leaves_nothing_behind(scratch: Path) -> None:
    made = Image.new("linux/arm/v6").config(platform="linux/amd64")
    config = exported(made, scratch / "out")[2]
    assert (config["architecture"], "variant" in config) == ("amd64", False)


def test_prefetching_needs_an_order(scratch: Path) -> None:
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"1"}), prefetch=["a"])
    with pytest.raises(UsageError, match="only eStargz layers have an order"):
        exported(made, scratch / "out", ",compression=gzip")
    done, _, _ = exported(made, scratch / "out", ",compression=estargz")
    assert done.layers[0].layer.prefetch_size > 0  # type: ignore[union-attr, operator]
    made.export(f"type=local,dest={scratch}/files")


@pytest.mark.parametrize(
    "options",
    [{"exposed_ports": [port]} for port in ("abc", "0", "65536", "90-80", "80/icmp", "")] + [{"volumes": [""]}],
)
def test_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is no port|a volume is a path"):
        Image.new("linux/amd64").config(**options)


def test_what_nobody_could_read_is_not_written(scratch: Path) -> None:
    made = Image.new("linux/amd64").config(env={"A": "x" * (5 << 20)})
    with pytest.raises(ImageError, match="over the limit of 4194304"):
        exported(made, scratch / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stalled_registry_does_not_hold_an_interrupt_up(number: int, scratch: Path) -> None:
    source = tree(scratch / "one", {"a": random.Random(1).randbytes(MIB)})
    with faulty_registry() as server:
        server.fault(r"^PUT .*/blobs/uploads/", *[lambda exchange: time.sleep(10)] * 9)
        line = f"type=image,name={server.host}/app:1,push=true"
        process = subprocess.Popen(
            [sys.executable, "-m", "estargz", "image", "build", "--layer", source, "--output", line]
        )
        deadline = time.monotonic() + 30
        while not server.requests(r"^PUT ") and time.monotonic() < deadline:
            time.sleep(0.02)
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(20) in (130, 143)
        assert time.monotonic() - started < 5


def test_what_is_read_once_cannot_be_built_again(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from estargz.image.layout import FolderUpload, Layout

    class Lost(FolderUpload):
        def commit(self, digest: str, size: int) -> None:
            raise UploadBrokenError("the connection was lost")

    monkeypatch.setattr(Layout, "upload", lambda self, room=None: Lost(self))
    made = Image.new("linux/amd64").append(io.BytesIO(tar_of(FILES[0])))
    with pytest.raises(UploadBrokenError, match="can be read once only; use a cache or a file"):
        exported(made, scratch / "out")


# --------------------------------------------------------------------------------------------------------------------
# places


def test_files_alone(scratch: Path) -> None:
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"1", "b": b"2"}))
    made = made.append(tree(scratch / "upper", {"b": b"2", "c/d": b"3"}), lower=scratch / "one")
    done = made.export(f"type=local,dest={scratch}/files")
    assert done.descriptor is None
    found = {path.relative_to(scratch / "files").as_posix() for path in (scratch / "files").rglob("*")}
    assert found == {"b", "c", "c/d"}
    made.export(f"type=tar,dest={scratch}/files.tar")
    listed = subprocess.run(["tar", "-tf", scratch / "files.tar"], capture_output=True, text=True, check=True).stdout
    assert listed.split() == ["b", "c/", "c/d"]


def test_the_local_store(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESTARGZ_CACHE", str(scratch / "cache"))
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"1"}))
    done = made.export("type=image,name=app:1,compression=estargz")
    assert done.names == [f"oci:{scratch}/cache:docker.io/library/app:1"]
    shown = subprocess.run(["skopeo", "inspect", "--raw", done.names[0]], capture_output=True, check=True).stdout
    assert sha256(shown) == done.descriptor.digest  # type: ignore[union-attr]
    made.config(cmd=["x"]).export("type=image,name=other:1,compression=estargz")
    assert len(json.loads((scratch / "cache/index.json").read_text())["manifests"]) == 2
    with VariantStore(scratch / "cache") as cache:
        cache.prune(keep_storage=0, grace=0)
    subprocess.run(["skopeo", "copy", done.names[0], f"dir:{scratch}/copy"], capture_output=True, check=True)


@pytest.mark.parametrize("kind", ["oci", "docker"])
def test_archives(kind: str, scratch: Path) -> None:
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"1"}))
    done = made.export(f"type={kind},dest={scratch}/image.tar,name=example.com/app:1")
    transport = "oci-archive" if kind == "oci" else "docker-archive"
    shown = subprocess.run(
        ["skopeo", "inspect", "--config", f"{transport}:{scratch}/image.tar"], capture_output=True, check=True
    ).stdout
    assert json.loads(shown)["rootfs"]["diff_ids"] == [layer.diff_id for layer in done.layers]


def test_a_registry_with_several_names(scratch: Path) -> None:
    (scratch / "registry").mkdir()
    made = Image.new("linux/amd64").append(tree(scratch / "one", {"a": b"1" * 100_000}))
    with registry(scratch / "registry") as server:
        names = [f"{server.host}/app:1", f"{server.host}/app:latest", f"{server.host}/team/other:2"]
        done = made.export(f'type=registry,"name={",".join(names)}",compression=estargz')
        assert done.names == [f"docker://{name}" for name in names]
        for name in names:
            command = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}"]
            assert sha256(subprocess.run(command, capture_output=True, check=True).stdout) == done.descriptor.digest  # type: ignore[union-attr]
        digest = made.config(cmd=["x"]).export(f"type=image,name={server.host}/app,push=true,push-by-digest=true")
        command = ["skopeo", "list-tags", "--tls-verify=false", f"docker://{server.host}/app"]
        tags = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["Tags"]
        assert sorted(tags) == ["1", "latest"]
        assert digest.names == [f"docker://{server.host}/app@{digest.descriptor.digest}"]  # type: ignore[union-attr]
        subprocess.run(["skopeo", "inspect", "--tls-verify=false", *digest.names], capture_output=True, check=True)


@pytest.mark.parametrize("cached", [False, True])
def test_a_push_through_twenty_drops(cached: bool, scratch: Path) -> None:
    """Docker's registry cannot go on with an upload: the layer is built again, or read again from the cache."""
    (scratch / "registry").mkdir()
    size = (1024 if os.environ.get("ESTARGZ_LONG_TESTS") else 24) * MIB
    (scratch / "tree").mkdir()
    with (scratch / "tree/noise").open("wb") as file:
        for number in range(size // MIB):
            file.write(random.Random(number).randbytes(MIB))
    made = Image.new("linux/amd64", registries=Registries(sleep=Pauses(), chunk_size=4 * MIB)).append(scratch / "tree")
    expected, _, _ = exported(made, scratch / "out", ",compression=estargz")
    rng = random.Random(5)
    with registry(scratch / "registry") as server, cutting_proxy(server.host) as proxy, ExitStack() as opened:
        cache = opened.enter_context(VariantStore(scratch / "cache")) if cached else None
        proxy.up += [rng.randrange(5 * MIB, size // 2) for _ in range(20)]
        done = made.export(f"type=image,name={proxy.host}/app:1,push=true,compression=estargz", cache=cache)
        assert proxy.cut == 20
        assert done.descriptor == expected.descriptor
        command = ["skopeo", "copy", "--src-tls-verify=false", f"docker://{server.host}/app:1", f"dir:{scratch}/copy"]
        subprocess.run(command, capture_output=True, check=True)


def test_nothing_to_do_is_an_error(scratch: Path) -> None:
    made = Image.new("linux/amd64")
    with pytest.raises(UsageError, match="needs push=true"):
        made.export("type=image,name=a,store=false")
    with pytest.raises(UsageError, match="by its name"):
        made.export("type=image")

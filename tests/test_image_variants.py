"""The cache of variants: what is found again, what is made once, what stays, and what happens when something breaks."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import IS_ROOT, missing
from reference.blobs import digest, tar_of
from sample_images import image, write_layout
from tars import nothing_leaks

import estargz
from estargz.cli import main
from estargz.errors import (
    CacheError,
    ImageError,
    SinkError,
    UploadBrokenError,
    UsageError,
    VerificationError,
)
from estargz.image.lanes import AbandonedError
from estargz.image.layout import create_layout
from estargz.image.model import OCI_CONFIG, OCI_MANIFEST, Descriptor
from estargz.image.reference import Reference
from estargz.image.variants import Source, VariantKey, VariantStore, default_cache
from estargz.layer import Layer
from estargz.options import Options

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
DAY = 86400.0
SPAWN = multiprocessing.get_context("spawn")
WORKERS = 8
TAR = tar_of(("d/", b""), ("d/a", b"first " * 9000), ("b", random.Random(1).randbytes(70_000)))


def made_of(tar: bytes, level: int = 6) -> tuple[VariantKey, Layer, bytes]:
    """A gzip layer by Python's own gzip, and what it is kept under."""
    blob = gzip.compress(tar, level, mtime=0)
    layer = Layer(
        compression="gzip",
        media_type=GZIP,
        digest=digest(blob),
        size=len(blob),
        diff_id=digest(tar),
        uncompressed_size=len(tar),
        tar_digest=digest(tar),
    )
    return VariantKey.of(digest(tar), Options(compression="gzip", level=level)), layer, blob


def keep(store: VariantStore, key: VariantKey, layer: Layer, blob: bytes) -> None:
    with store.upload() as upload:
        upload.write(blob)
        store.add(key, layer, upload)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(cache: Path) -> Iterator[VariantStore]:
    with VariantStore(cache) as opened:
        yield opened


def blobs(cache: Path) -> list[str]:
    """Digests of all blobs, each checked by sha256sum; nothing else lies beside them."""
    paths = sorted((cache / "blobs" / "sha256").iterdir())
    assert paths == [path for path in paths if path.is_file() and len(path.name) == 64]
    if paths:
        told = subprocess.run(["sha256sum", *paths], capture_output=True, text=True, check=True).stdout
        assert [line.split()[0] for line in told.splitlines()] == [path.name for path in paths]
    return [f"sha256:{path.name}" for path in paths]


def rows(cache: Path) -> list[str]:
    """Digests that the index names, read by SQLite itself."""
    with sqlite3.connect(cache / "index.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [row[0] for row in database.execute("SELECT digest FROM variants ORDER BY digest")]


def path_of(cache: Path, layer: Layer) -> Path:
    return cache / "blobs" / "sha256" / layer.digest.removeprefix("sha256:")


def whole(store: VariantStore, blob: Layer | Descriptor) -> bytes:
    with store.open(blob) as reader:
        return b"".join(iter(lambda: reader.read(1 << 16), b""))


# ------------------------------------------------------------------------------------------------- found again


def test_a_layer_is_found_again_with_all_that_is_known_of_it(cache: Path) -> None:
    key, plain, blob = made_of(TAR)
    layer = Layer(
        compression="estargz",
        media_type=plain.media_type,
        digest=plain.digest,
        size=plain.size,
        diff_id=digest(b"with a table"),
        uncompressed_size=len(TAR) + 1024,
        toc_digest=digest(b"table"),
        tar_digest=plain.tar_digest,
        prefetch_size=512,
        missing=("etc/\N{SNOWMAN}", "no/utf-8/\udcff"),
        stages={"hash": 0.5},
    )
    with VariantStore(cache) as store:
        assert store.find(key) is None
        keep(store, key, layer, blob)
    with VariantStore(cache) as store:
        assert store.find(key) == layer
        assert store.find(VariantKey.of(digest(TAR), Options(compression="gzip", level=5))) is None
        assert gzip.decompress(whole(store, layer)) == TAR
    assert blobs(cache) == rows(cache) == [layer.digest]


def written(path: Path, **options: Any) -> bytes:
    with estargz.Writer(path, **options) as writer:
        writer.write(TAR)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"compression": "gzip", "chunk_size": 5000}, {"compression": "gzip", "min_chunk_size": 9}),
        ({"compression": "zstd", "chunk_size": 5000}, {"compression": "zstd", "min_chunk_size": 9}),
        ({"compression": "zstd", "level": 3}, {"compression": "zstd"}),
        ({"compression": "uncompressed", "level": 1}, {"compression": "uncompressed", "level": 9}),
        ({"level": 2}, {}),
        ({"threads": 1}, {"threads": 2, "memory": 64 << 20}),
    ],
)
def test_options_that_leave_the_bytes_alone_leave_the_key_alone(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert written(tmp_path / "one", **one) == written(tmp_path / "other", **other)
    assert VariantKey.of(digest(TAR), Options(**one)) == VariantKey.of(digest(TAR), Options(**other))


def test_everything_else_makes_another_key() -> None:
    tar = digest(TAR)
    keys = [
        VariantKey.of(digest(b"another"), Options()),
        *(VariantKey.of(tar, Options(compression=kind)) for kind in ("estargz", "gzip", "zstd", "uncompressed")),
        *(VariantKey.of(tar, Options(level=level)) for level in (1, 3, 4, 12)),
        VariantKey.of(tar, Options(chunk_size=4096)),
        VariantKey.of(tar, Options(min_chunk_size=4096)),
        VariantKey.of(tar, Options(), {"prefetch": ["a", "b"]}),
        VariantKey.of(tar, Options(), {"prefetch": ["b", "a"]}),
        VariantKey.of(tar, Options(), {"landmark": False}),
    ]
    assert len({key.text for key in keys}) == len(set(keys)) == len(keys)
    same = {"landmark": False, "prefetch": ["a"]}
    turned = dict(reversed(same.items()))
    assert VariantKey.of(tar, Options(), same) == VariantKey.of(tar, Options(), turned)
    with pytest.raises(ImageError, match="no digest"):
        VariantKey.of("sha256:../x", Options())


def test_another_version_of_the_package_or_its_encoder_makes_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    key = VariantKey.of(digest(TAR), Options())
    assert key.encoder != VariantKey.of(digest(TAR), Options(level=9)).encoder
    monkeypatch.setattr(estargz, "__version__", "999.0")
    assert VariantKey.of(digest(TAR), Options()) != key


def test_what_a_blob_holds_is_remembered(cache: Path, store: VariantStore) -> None:
    key, layer, blob = made_of(TAR)
    elsewhere, tar = digest(b"in a registry"), digest(TAR)
    assert store.tar_of(elsewhere) is None
    store.note_source(elsewhere, tar, compression="zstd")
    store.note_source(elsewhere, tar, diff_id=tar)
    assert store.source(elsewhere) == Source(tar, "zstd", tar)
    keep(store, key, layer, blob)
    assert store.source(layer.digest) == Source(tar, "gzip", tar)
    with VariantStore(cache) as other:
        assert other.tar_of(elsewhere) == tar
    for wrong in [("sha256:0", tar), (tar, "../x")]:
        with pytest.raises(ImageError, match="no digest"):
            store.note_source(*wrong)


def test_a_reordered_layer_holds_another_tar_than_it_was_made_of(store: VariantStore) -> None:
    key, layer, blob = made_of(TAR[::-1])
    asked = VariantKey.of(digest(TAR), Options(), {"prefetch": ["b"]})
    keep(store, asked, layer, blob)
    assert store.find(asked) == layer
    assert store.tar_of(layer.digest) == digest(TAR[::-1])
    assert store.find(key) is None


# ------------------------------------------------------------------------------------------------- made once


def make_once(cache: Path, number: int, barrier: Any, log: Path) -> None:
    """In a process: asks for two variants, and writes down which it made and what it got."""
    with VariantStore(cache) as store:
        barrier.wait(60)
        for level in (1, 9) if number % 2 else (9, 1):
            options = Options(level=level)
            key = VariantKey.of(digest(TAR), options)
            with store.making(key) as layer:
                if layer is None:
                    with store.upload() as upload, estargz.Writer(upload, level=level) as writer:
                        writer.write(TAR)
                        layer = writer.close()
                        store.add(key, layer, upload)
                    note(log, f"made {level} {layer.digest}")
            assert digest(whole(store, layer)) == layer.digest
            assert store.tar_of(layer.digest) == layer.tar_digest == digest(TAR)
            note(log, f"got {level} {layer.digest}")


def note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(f"{line}\n")


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = SPAWN.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def run_makers(cache: Path, log: Path) -> None:
    barrier = SPAWN.Barrier(WORKERS)
    processes = [start(make_once, cache, number, barrier, log) for number in range(WORKERS)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * WORKERS


def test_processes_that_ask_at_once_get_one_blob_made_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_makers(cache, log)
    lines = log.read_text().splitlines()
    made = [line.removeprefix("made ") for line in lines if line.startswith("made")]
    assert len(made) == 2
    assert sorted(line for line in lines if line.startswith("got")) == sorted(f"got {line}" for line in made * WORKERS)
    assert blobs(cache) == rows(cache) == sorted(line.split()[1] for line in made)
    assert os.listdir(cache / "locks") == []


def test_threads_that_ask_at_once_get_one_blob_made_once(store: VariantStore) -> None:
    key, layer, blob = made_of(TAR)
    made, barrier = [], threading.Barrier(WORKERS)

    def ask(_: int) -> Layer | None:
        barrier.wait(60)
        with store.making(key) as found:
            if found is None:
                made.append(key)
                keep(store, key, layer, blob)
        return store.find(key)

    with ThreadPoolExecutor(WORKERS) as threads:
        assert list(threads.map(ask, range(WORKERS))) == [layer] * WORKERS
    assert made == [key]


def test_waiting_can_be_given_up(cache: Path, store: VariantStore) -> None:
    key, *_ = made_of(TAR)
    slept: list[float] = []

    def check() -> None:
        if len(slept) == 3:
            raise AbandonedError("given up")

    with VariantStore(cache, sleep=slept.append) as other, store.making(key) as found:
        assert found is None
        with pytest.raises(AbandonedError), other.making(key, check):
            pytest.fail("two make the same")
    assert len(slept) == 3


def test_who_fails_leaves_it_to_the_next(cache: Path, store: VariantStore) -> None:
    key, layer, blob = made_of(TAR)
    with pytest.raises(RuntimeError), store.making(key), store.upload() as upload:
        upload.write(blob[:1000])
        raise RuntimeError
    assert blobs(cache) == os.listdir(cache / "locks") == []
    with store.making(key) as found:
        assert found is None
        keep(store, key, layer, blob)
    with store.making(key) as found:
        assert found == layer


def test_a_lock_that_its_owner_has_just_removed_is_taken_anew(
    cache: Path, store: VariantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, *_ = made_of(TAR)
    flock = fcntl.flock
    others: list[Any] = []

    def slow(handle: int, operation: int) -> None:
        """Meanwhile the owner ends, and another one comes."""
        flock(handle, operation)
        (path,) = (cache / "locks").glob("make-*")
        if not others:
            path.unlink()
            others.append(path.open("w"))
            flock(others[0], operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with store.making(key, lambda: others.append(others[0].close())) as found:
        assert found is None
    assert len(others) == 2


def test_a_lock_that_cannot_be_had(store: VariantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key, layer, blob = made_of(TAR)

    def none_left(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none_left)
    with nothing_leaks():
        with pytest.raises(CacheError, match="/locks/make-.*: cannot be locked: No locks available; choose"):
            store.making(key).__enter__()
        with pytest.raises(CacheError, match="/locks/use-.*: cannot be locked: No locks available; choose"):
            keep(store, key, layer, blob)


def test_a_blob_that_cannot_be_hashed_is_closed(store: VariantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key, layer, blob = made_of(TAR)
    keep(store, key, layer, blob)

    def no_memory(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr("hashlib.new", no_memory)
    with nothing_leaks(), pytest.raises(MemoryError) as caught:
        store.open(layer)
    del caught


def test_a_layer_outlives_a_failure_of_whatever_it_was_made_for(store: VariantStore) -> None:
    key, layer, blob = made_of(TAR)
    with pytest.raises(RuntimeError), store.making(key):
        keep(store, key, layer, blob)
        raise RuntimeError("the registry is gone")
    assert store.find(key) == layer


# ------------------------------------------------------------------------------------------------- killed


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die_while_making(cache: Path, where: str) -> None:
    key, layer, blob = made_of(TAR)
    store = VariantStore(cache)
    with store.making(key), store.upload() as upload:
        upload.write(blob[:1000])
        if where == "uploading":
            die()
        upload.write(blob[1000:])
        commit = upload.commit
        if where == "committed":
            upload.commit = lambda *arguments: (commit(*arguments), die())  # type: ignore[method-assign, assignment]
        if where == "entering":
            store._note = lambda *arguments: die()  # type: ignore[method-assign]
        store.add(key, layer, upload)
        die()


@pytest.mark.parametrize(
    ("where", "left", "entered"),
    [("uploading", 0, 0), ("committed", 1, 0), ("entering", 1, 0), ("afterwards", 1, 1)],
)
def test_who_is_killed_leaves_it_to_the_next(cache: Path, where: str, left: int, entered: int) -> None:
    key, layer, blob = made_of(TAR)
    process = start(die_while_making, cache, where)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (len(blobs(cache)), len(rows(cache))) == (left, entered)
    with VariantStore(cache) as store:
        with store.making(key, lambda: pytest.fail("waits for the dead")) as found:
            assert found == (layer if entered else None)
            if found is None:
                keep(store, key, layer, blob)
        assert store.prune(grace=-60) == []
    assert blobs(cache) == rows(cache) == [layer.digest]
    assert os.listdir(cache / "locks") == []


def test_what_the_killed_have_left_is_swept(cache: Path) -> None:
    process = start(die_while_making, cache, "committed")
    process.join(60)
    _, layer, _ = made_of(TAR)
    with VariantStore(cache) as store:
        assert store.prune() == []  # it may be part of an image that is not finished
        removed = store.prune(grace=-60)
    assert [(item.name, item.freed, item.variant) for item in removed] == [(layer.digest, layer.size, False)]
    assert blobs(cache) == os.listdir(cache / "locks") == []


def use(cache: Path, ready: Any, done: Any) -> None:
    store = VariantStore(cache)
    ready.put(store.find(made_of(TAR)[0]) is not None)
    done.wait(60)


def test_what_a_process_uses_is_not_pruned_until_it_ends(cache: Path) -> None:
    key, layer, blob = made_of(TAR)
    with VariantStore(cache) as store:
        keep(store, key, layer, blob)
    ready, done = SPAWN.Queue(), SPAWN.Event()
    process = start(use, cache, ready, done)
    assert ready.get(timeout=60)
    with VariantStore(cache) as store:
        assert store.prune(keep_storage=0, older_than=-60, grace=-60) == []
        assert [row.in_use for row in store.usage()] == [True]
        process.kill()
        process.join(60)
        assert [row.in_use for row in store.usage()] == [False]
        assert [item.name for item in store.prune(keep_storage=0)] == [layer.digest]
        assert store.find(key) is None
    assert blobs(cache) == rows(cache) == os.listdir(cache / "locks") == []


def test_pruning_beside_makers_takes_nothing_from_them(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    stop = threading.Event()

    def prune() -> None:
        while not stop.is_set():
            with VariantStore(cache) as store:
                store.prune(keep_storage=0)

    with ThreadPoolExecutor(1) as threads:
        pruning = threads.submit(prune)
        try:
            run_makers(cache, log)
        finally:
            stop.set()
        pruning.result(60)
    assert log.read_text().count("got") == 2 * WORKERS


# ------------------------------------------------------------------------------------------------- room


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def three(cache: Path, clock: Clock) -> list[tuple[VariantKey, Layer]]:
    """Variants made a day apart, the first of them used last."""
    kept = []
    for number in range(3):
        key, layer, blob = made_of(tar_of((f"file{number}", os.urandom(1000))))
        with VariantStore(cache, clock=clock) as store:
            keep(store, key, layer, blob)
        kept.append((key, layer))
        clock.now += DAY
    with VariantStore(cache, clock=clock) as store:
        assert store.find(kept[0][0]) == kept[0][1]
    return kept


def test_the_longest_unused_go_first(cache: Path) -> None:
    clock = Clock()
    (first, a), (second, b), (third, c) = three(cache, clock)
    with VariantStore(cache, clock=clock) as store:
        assert [row.digest for row in store.usage()] == [a.digest, c.digest, b.digest]
        assert store.prune(keep_storage=a.size + b.size + c.size) == []
        assert [item.name for item in store.prune(keep_storage=a.size + b.size + c.size - 1)] == [b.digest]
        assert [item.name for item in store.prune(keep_storage=a.size)] == [c.digest]
        assert [store.find(key) for key in (first, second, third)] == [a, None, None]
    assert blobs(cache) == rows(cache) == [a.digest]


def test_what_was_not_used_for_long_goes(cache: Path) -> None:
    clock = Clock()
    (_, a), (_, b), (_, c) = three(cache, clock)
    with VariantStore(cache, clock=clock) as store:
        assert [item.name for item in store.prune(older_than=1.5 * DAY)] == [b.digest]
        assert [item.name for item in store.prune(older_than=0.5 * DAY, keep_storage=1 << 30)] == [c.digest]
        assert store.prune() == []
        (row,) = store.usage()
    assert (row.digest, row.size, row.compression, row.level, row.tar_digest) == (
        a.digest,
        a.size,
        "gzip",
        6,
        a.diff_id,
    )
    assert row.last_used - row.created == 3 * DAY


def test_a_blob_of_several_variants_goes_with_the_last_used(cache: Path) -> None:
    clock = Clock()
    key, layer, blob = made_of(TAR)
    with VariantStore(cache, clock=clock) as store:
        keep(store, key, layer, blob)
        clock.now += DAY
        keep(store, VariantKey.of(digest(TAR), Options(compression="gzip", level=12)), layer, blob)
    with VariantStore(cache, clock=clock) as store:
        assert store.prune(keep_storage=layer.size, older_than=DAY / 2) == []
        assert [item.freed for item in store.prune(keep_storage=layer.size - 1)] == [layer.size]
    assert rows(cache) == []


def test_files_that_nothing_knows_go_when_they_are_old(cache: Path, store: VariantStore) -> None:
    folder = cache / "blobs" / "sha256"
    names = ["0" * 64, "1" * 64, ".estargz-0123456789abcdef.tmp", "notes"]
    for name in names:
        (folder / name).write_bytes(b"12345")
        os.utime(folder / name, (0, time.time() - 2 * DAY))
    os.utime(folder / names[1])
    (folder / ("2" * 64)).symlink_to(cache / "index.json")
    os.utime(folder / ("2" * 64), (0, 0), follow_symlinks=False)
    removed = store.prune()
    assert sorted(item.name for item in removed) == [names[2], f"sha256:{names[0]}", f"sha256:{'2' * 64}"]
    assert sorted(os.listdir(folder)) == [names[1], "notes"]
    assert (cache / "index.json").exists()


def test_sources_are_forgotten_once_nothing_is_left_of_them(cache: Path) -> None:
    clock = Clock()
    key, layer, blob = made_of(TAR)
    with VariantStore(cache, clock=clock) as store:
        keep(store, key, layer, blob)
        store.note_source(digest(b"compressed by others"), digest(TAR))
        store.note_source(digest(b"of nothing here"), digest(b"nothing"))
    clock.now += 2 * DAY
    with VariantStore(cache, clock=clock) as store:
        store.prune()
        assert store.tar_of(digest(b"compressed by others")) == store.tar_of(layer.digest) == digest(TAR)
        assert store.tar_of(digest(b"of nothing here")) is None
        store.prune(keep_storage=0)
        assert store.tar_of(digest(b"compressed by others")) is None


# ------------------------------------------------------------------------------------------------- images beside variants


def skopeo(*arguments: object) -> str:
    if shutil.which("skopeo") is None:
        missing("skopeo is not installed")
    command = ["skopeo", "--insecure-policy", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def add_image(cache: Path, name: str, layer: Layer) -> None:
    """An image whose one layer is in the cache already."""
    target = create_layout(Reference.parse(f"oci:{cache}:{name}"))
    rootfs = {"type": "layers", "diff_ids": [layer.diff_id]}
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()
    assert target.has(Descriptor(layer.media_type, layer.digest, layer.size))
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": target.write(config), "size": len(config)},
        "layers": [layer.descriptor()],
    }
    target.finish(target.put_manifest(OCI_MANIFEST, json.dumps(manifest).encode()))


@pytest.mark.parametrize("linked", [False, True])
def test_an_image_of_the_directory_keeps_its_blobs(cache: Path, tmp_path: Path, linked: bool) -> None:
    key, layer, blob = made_of(TAR)
    _, other, other_blob = made_of(TAR, 1)
    with VariantStore(cache) as store:
        keep(store, key, layer, blob)
        keep(store, VariantKey.of(digest(TAR), Options(level=1)), other, other_blob)
    add_image(cache, "app", layer)
    if linked:  # as build systems make layouts
        (entry,) = json.loads((cache / "index.json").read_text())["manifests"]
        manifest = cache / "blobs" / "sha256" / entry["digest"].removeprefix("sha256:")
        manifest.rename(tmp_path / "manifest")
        manifest.symlink_to(tmp_path / "manifest")
    assert json.loads(skopeo("inspect", f"oci:{cache}:app"))["Layers"] == [layer.digest]
    with VariantStore(cache) as store:
        assert {row.digest: row.in_image for row in store.usage()} == {layer.digest: True, other.digest: False}
        assert [item.name for item in store.prune(keep_storage=0, grace=-60)] == [other.digest]
        assert store.find(key) == layer
    skopeo("copy", f"oci:{cache}:app", f"dir:{tmp_path}/out")
    assert (tmp_path / "out" / layer.digest.removeprefix("sha256:")).read_bytes() == blob


def test_an_image_that_skopeo_put_there_stays(cache: Path, tmp_path: Path) -> None:
    key, layer, blob = made_of(TAR)
    with VariantStore(tmp_path / "first") as store:
        keep(store, key, layer, blob)
    add_image(tmp_path / "first", "app", layer)
    VariantStore(cache).close()
    skopeo("copy", f"oci:{tmp_path}/first:app", f"oci:{cache}:copied")
    there = blobs(cache)
    with VariantStore(cache) as store:
        assert store.prune(keep_storage=0, grace=-60) == []
        (cache / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')
        assert sorted(item.name for item in store.prune(grace=-60)) == there
    assert len(there) == 3


def test_nothing_is_pruned_beside_an_image_that_nobody_understands(cache: Path, store: VariantStore) -> None:
    key, layer, blob = made_of(TAR)
    keep(store, key, layer, blob)
    text = b'{"schemaVersion": 2, "layers": 7}'
    entry = {"mediaType": OCI_MANIFEST, "digest": store.write(text), "size": len(text)}
    (cache / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    with VariantStore(cache) as other, pytest.raises(ImageError, match="layers is no JSON array"):
        other.prune(keep_storage=0, grace=-60)
    assert store.find(key) == layer


def test_a_layout_takes_a_variant_over_without_a_copy(cache: Path, tmp_path: Path) -> None:
    key, layer, blob = made_of(TAR)
    with VariantStore(cache) as store:
        keep(store, key, layer, blob)
        target = create_layout(Reference.parse(f"oci:{tmp_path}/out:x"))
        assert target.link(Descriptor(layer.media_type, layer.digest, layer.size), store)
    assert os.path.samefile(path_of(tmp_path / "out", layer), path_of(cache, layer))
    with VariantStore(cache) as store:
        assert [item.freed for item in store.prune(keep_storage=0)] == [0]
    assert path_of(tmp_path / "out", layer).read_bytes() == blob


# ------------------------------------------------------------------------------------------------- damage


def test_a_damaged_blob_is_dropped_by_who_reads_it(cache: Path, store: VariantStore) -> None:
    key, layer, blob = made_of(TAR)
    keep(store, key, layer, blob)
    path_of(cache, layer).write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    assert store.find(key) == layer  # its size is right
    with pytest.raises(VerificationError, match="damaged.*run again"):
        whole(store, layer)
    assert store.find(key) is None
    assert blobs(cache) == rows(cache) == []
    keep(store, key, layer, blob)
    assert whole(store, layer) == blob


@pytest.mark.parametrize("how", ["truncated", "longer", "gone", "a link", "a directory"])
def test_a_blob_that_is_no_longer_what_it_was_is_not_found(cache: Path, store: VariantStore, how: str) -> None:
    key, layer, blob = made_of(TAR)
    keep(store, key, layer, blob)
    path = path_of(cache, layer)
    path.unlink()
    if how == "a link":
        (cache / "elsewhere").write_bytes(blob)
        path.symlink_to(cache / "elsewhere")
    elif how == "a directory":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(blob[:-1] if how == "truncated" else blob + b"x")
    assert store.find(key) is None
    assert rows(cache) == []
    if how == "a directory":
        path.rmdir()
    keep(store, key, layer, blob)
    assert (store.find(key), blobs(cache), whole(store, layer)) == (layer, [layer.digest], blob)


@pytest.mark.parametrize("how", ["truncated", "gone"])
def test_a_blob_that_cannot_be_opened_is_dropped(cache: Path, store: VariantStore, how: str) -> None:
    key, layer, blob = made_of(TAR)
    keep(store, key, layer, blob)
    path_of(cache, layer).write_bytes(b"")
    if how == "gone":
        path_of(cache, layer).unlink()
    with pytest.raises(VerificationError, match="run again"):
        store.open(layer)
    assert blobs(cache) == rows(cache) == []


def test_a_blob_that_was_made_anew_is_not_dropped_for_what_the_old_one_was(cache: Path, store: VariantStore) -> None:
    key, layer, blob = made_of(TAR)
    keep(store, key, layer, blob)
    path_of(cache, layer).write_bytes(bytes(len(blob)))
    with store.open(layer) as reader:
        path_of(cache, layer).unlink()
        keep(store, key, layer, blob)
        with pytest.raises(VerificationError):
            while reader.read(1 << 16):
                pass
    assert store.find(key) == layer
    assert whole(store, layer) == blob


def test_a_blob_of_another_size_is_not_entered(cache: Path, store: VariantStore) -> None:
    key, layer, blob = made_of(TAR)
    with pytest.raises(VerificationError):
        keep(store, key, layer, blob[:-1])
    assert store.find(key) is None
    assert blobs(cache) == rows(cache) == []


def test_a_blob_that_goes_away_before_it_is_entered_is_to_be_made_again(cache: Path, store: VariantStore) -> None:
    key, layer, _ = made_of(TAR)

    class Upload:
        def commit(self, digest: str, size: int) -> None:
            """Somebody is faster, and removes it."""

    with pytest.raises(UploadBrokenError, match="make it again"):
        store.add(key, layer, Upload())  # type: ignore[arg-type]
    assert rows(cache) == []


def test_a_variant_is_entered_whole_or_not_at_all(
    cache: Path, store: VariantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, layer, blob = made_of(TAR)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_note", interrupt)
        keep(store, key, layer, blob)
    assert (store.find(key), store.source(layer.digest), rows(cache)) == (None, None, [])
    keep(store, key, layer, blob)
    assert store.find(key) == layer


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_forged_rows_lead_nowhere(cache: Path, store: VariantStore, tmp_path: Path) -> None:
    key, layer, blob = made_of(TAR)
    victim = tmp_path / "victim"
    victim.write_bytes(blob)
    path = "sha256:../../../victim"
    for column, true in [
        ("digest", ""),
        ("layer", layer.digest),
        ("layer", layer.diff_id),
        ("key", "["),
        ("layer", "{"),
    ]:
        keep(store, key, layer, blob)
        with sqlite3.connect(cache / "index.sqlite") as database:
            (text,) = database.execute(f"SELECT {column} FROM variants").fetchone()
            forged = text.replace(true, path) if true else path
            database.execute(f"UPDATE variants SET {column} = ?", (forged,))
        assert store.find(key) == (layer if column == "digest" else None)
        store.usage()
        with VariantStore(cache) as other:
            other.prune(keep_storage=0, grace=-60)
        with sqlite3.connect(cache / "index.sqlite") as database:
            database.execute("DELETE FROM variants")
    with sqlite3.connect(cache / "index.sqlite") as database:
        database.execute("UPDATE sources SET tar_digest = ?", (path,))
    assert store.tar_of(layer.digest) is None
    assert victim.read_bytes() == blob


# ------------------------------------------------------------------------------------------------- the directory


def test_the_directory_is_its_owners_alone(cache: Path, store: VariantStore) -> None:
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESTARGZ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache() == Path("/home/somebody/.cache/estargz")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is to be ignored, says its specification
    assert default_cache() == Path("/home/somebody/.cache/estargz")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/somebody")
    assert default_cache() == Path("/var/cache/somebody/estargz")
    monkeypatch.setenv("ESTARGZ_CACHE", "/srv/cache")
    assert default_cache() == Path("/srv/cache")


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(CacheError, match="neither empty nor a cache"):
        VariantStore(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_layout_of_images_is_not_taken_for_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = write_layout(tmp_path / "layout", image())
    before = {path: path.read_bytes() for path in layout.rglob("*") if path.is_file()}
    for path in before:
        os.utime(path, (0, 0))
    with pytest.raises(CacheError, match="is no cache, but an image layout"):
        VariantStore(layout)
    assert main(["cache", "prune", "--all", "--cache", str(layout)]) == CacheError.exit_code
    assert "is no cache" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in layout.rglob("*") if path.is_file()} == before


def test_a_cache_that_is_half_made_is_completed(tmp_path: Path) -> None:
    (tmp_path / "blobs/sha256").mkdir(parents=True)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    key, layer, blob = made_of(TAR)
    with VariantStore(tmp_path) as store:
        keep(store, key, layer, blob)
        assert store.find(key) == layer


def test_a_file_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="choose another directory"):
        VariantStore(tmp_path / "file")


@pytest.mark.parametrize("before", ["nothing", "a cache"])
def test_a_directory_that_cannot_be_written_to(scratch: Path, before: str) -> None:
    if before == "a cache":
        VariantStore(scratch).close()
    for path in [scratch, *scratch.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if IS_ROOT:
        os.seteuid(65534)
    try:
        with pytest.raises(CacheError, match=r"check its rights, or choose another directory"):
            VariantStore(scratch)
    finally:
        if IS_ROOT:
            os.seteuid(0)
        scratch.chmod(0o755)


def test_a_locked_index_is_not_waited_for_for_ever(cache: Path) -> None:
    key, *_ = made_of(TAR)
    with VariantStore(cache, patience=0.05) as store, sqlite3.connect(cache / "index.sqlite") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CacheError, match="another process holds it; try again"):
            store.find(key)
        other.rollback()
        assert store.find(key) is None


@pytest.mark.parametrize("where", [0, 4096, 8192])
def test_a_damaged_index_says_so_and_can_be_removed(cache: Path, where: int) -> None:
    key, layer, blob = made_of(TAR)
    with VariantStore(cache) as store:
        keep(store, key, layer, blob)
    with (cache / "index.sqlite").open("r+b") as file:
        file.seek(where)
        file.write(os.urandom(4096))
    with pytest.raises(CacheError, match="index.sqlite: .*it is damaged; remove it"), VariantStore(cache) as store:
        store.find(key)
    for path in cache.glob("index.sqlite*"):
        path.unlink()
    with VariantStore(cache) as store:
        keep(store, key, layer, blob)
        assert store.find(key) == layer


def test_an_index_of_another_version_is_left_alone(cache: Path) -> None:
    VariantStore(cache).close()
    with sqlite3.connect(cache / "index.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(CacheError, match="version 99.*use that one, or choose another directory"):
        VariantStore(cache)


def fill_the_disk(cache: Path, when: str, outcome: Any) -> None:
    key, layer, blob = made_of(TAR)
    store = VariantStore(cache)
    try:
        with store.making(key), store.upload() as upload:
            limit = 50_000 if when == "uploading" else len(blob)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            upload.write(blob)
            if when == "entering":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit))
            store.add(key, layer, upload)
    except (SinkError, CacheError) as error:
        outcome.put((type(error).__name__, str(error)))


@pytest.mark.parametrize(("when", "kind"), [("uploading", "SinkError"), ("entering", "CacheError")])
def test_a_full_disk_leaves_nothing_half_done(cache: Path, when: str, kind: str) -> None:
    key, layer, blob = made_of(TAR)
    VariantStore(cache).close()
    outcome = SPAWN.Queue()
    process = start(fill_the_disk, cache, when, outcome)
    name, message = outcome.get(timeout=60)
    process.join(60)
    assert (name, "free some space" in message) == (kind, True)
    assert blobs(cache) == rows(cache) == []
    with VariantStore(cache) as store:
        keep(store, key, layer, blob)
        assert store.find(key) == layer


# ------------------------------------------------------------------------------------------------- the command


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    assert main(["cache", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out.splitlines()


def test_the_listing(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.now = 1_700_000_000.0
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    (_, a), (_, b), (_, c) = three(cache, clock)
    add_image(cache, "app", c)
    monkeypatch.setenv("ESTARGZ_CACHE", str(cache))
    shown = [f"{layer.digest[7:19]} {layer.size:>12} gzip-6      " for layer in (a, c, b)]
    assert output(capsys, "ls") == [
        f"{shown[0]} 2023-11-17 22:13",
        f"{shown[1]} 2023-11-16 22:13  in an image",
        f"{shown[2]} 2023-11-15 22:13",
        f"3 layers, {(a.size + b.size + c.size) / 1e6:.1f} MB",
    ]
    told = [json.loads(line) for line in output(capsys, "ls", "--json", "--cache", cache)]
    assert [(row["digest"], row["size"], row["in_image"]) for row in told] == [
        (layer.digest, layer.size, layer is c) for layer in (a, c, b)
    ]
    assert (told[2]["created"], told[0]["last_used"]) == (1_700_000_000 + DAY, 1_700_000_000 + 3 * DAY)


def test_pruning_by_the_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    clock.now -= 10 * DAY
    (_, a), (_, b), (_, c) = three(cache, clock)
    assert output(capsys, "prune", "--cache", cache) == ["0 removed, 0.0 MB freed"]
    assert output(capsys, "prune", "--cache", cache, "--older-than", "4w", "--keep-storage", "1GiB")[0][0] == "0"
    told = output(capsys, "prune", "--cache", cache, "--keep-storage", a.size + c.size, "--json")
    assert [json.loads(line) for line in told] == [{"name": b.digest, "freed": b.size, "variant": True}]
    assert output(capsys, "prune", "--cache", cache, "--older-than", "180h")[0] == c.digest
    assert output(capsys, "prune", "--cache", cache, "--all") == [a.digest, "1 removed, 0.0 MB freed"]
    assert output(capsys, "ls", "--cache", cache) == ["0 layers, 0.0 MB"]


def test_a_cache_that_is_not_there_is_not_made_to_be_looked_at(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "ls", "--cache", cache) == ["0 layers, 0.0 MB"]
    assert output(capsys, "prune", "--cache", cache, "--all") == ["0 removed, 0.0 MB freed"]
    assert not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["prune", "--all", "--keep-storage", "1"], UsageError.exit_code, "--all leaves nothing to choose"),
        (["prune", "--older-than", "3"], 2, "'3' is no duration"),
        (["prune", "--keep-storage", "much"], 2, "'much' is no size"),
        (["ls", "--cache", "/dev/null"], 1, "choose another directory"),
        ([], 2, "Missing command"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str) -> None:
    assert main(["cache", *arguments]) == status
    printed = capsys.readouterr()
    assert (printed.out, words in printed.err) == ("", True)

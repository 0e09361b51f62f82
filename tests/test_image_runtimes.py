"""Images that the package writes, in the hands of others: skopeo and umoci take them, podman, containerd and BuildKit run them.

And the other way round: those that BuildKit pushed, converted.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from applied import COMMAND, Found, snapshot
from conftest import REPOSITORY, missing
from registry import PROGRAM, Registry, registry, sha256
from runtimes import (
    RUN_SECONDS,
    Containerd,
    Podman,
    Sandbox,
    by_path,
    compile_show,
    containerd,
    lines,
    listing,
    podman,
    run,
    run_in_buildkit,
    sandbox,
)
from trees import CAPABILITY, SECOND, WHOLE, Tree, overlay_mount
from trees import run as run_quietly

from estargz.image.convert import convert
from estargz.image.image import Image
from estargz.registry.client import Registries

sys.path.insert(0, str(REPOSITORY / "bench"))

import buildkitd

pytestmark = pytest.mark.usefixtures("overlay")

HERE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
ELSEWHERE = "s390x"
MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True, slots=True)
class Form:
    """What an image's layers are compressed by, and whose media types it has."""

    compression: str
    docker: bool = False

    def __str__(self) -> str:
        return f"{'docker' if self.docker else 'oci'}-{self.compression}"

    @property
    def line(self) -> str:
        return f"compression={self.compression},oci-mediatypes={str(not self.docker).lower()}"


OCI = [Form(name) for name in ("uncompressed", "gzip", "estargz", "zstd")]
DOCKER = [Form(name, docker=True) for name in ("uncompressed", "gzip")]
PLACES = {"oci": OCI, "oci-archive": OCI, "docker-archive": OCI + DOCKER, "docker": OCI + DOCKER}


def forms_by_place(*places: str) -> pytest.MarkDecorator:
    pairs = [(form, place) for place in places for form in PLACES[place]]
    return pytest.mark.parametrize(("form", "place"), pairs, ids=[f"{place}-{form}" for form, place in pairs])


# ------------------------------------------------------------------------------------------------- the image


@dataclass(frozen=True, slots=True)
class Layers:
    """Sources of layers, the lowest first, and what they are together."""

    base: Path
    changed: Path
    upper: Path
    tar: Path
    merged: Path

    def image(self, architecture: str = HERE, *, prefetch: Sequence[str] = ()) -> Image:
        image = Image.new(f"linux/{architecture}")
        image = image.append(self.base, prefetch=prefetch)
        image = image.append(self.changed, lower=self.base)
        image = image.append(self.upper, overlay_lower=[self.changed])
        return image.append(self.tar).config(entrypoint=["/bin/show"], cmd=["/tree"])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One that is removed at once, and whose path is short enough for sockets."""
    # Podman makes an image's name of the path: no component may begin or end with an underscore.
    with tempfile.TemporaryDirectory(prefix="estargz-test-x", suffix="x") as made:
        yield Path(made)


@pytest.fixture(scope="module")
def layers(folder: Path, overlay: None) -> Layers:
    place = folder / "layers"
    place.mkdir()
    base, changed, merged = place / "base", place / "changed", place / "merged"
    make_base(Tree(base), compile_show(place))
    run_quietly(["cp", "-a", base, changed])
    change(Tree(changed))
    upper = place / "upper"
    with overlay_mount([changed], upper) as mounted:
        change_mounted(Tree(mounted))
    same_times(upper)
    with overlay_mount([changed], upper) as mounted:
        run_quietly(["cp", "-a", mounted, merged])
    tar = make_tar(place)
    run_quietly(["tar", "--xattrs", "--same-owner", "-xpf", tar, "-C", merged])
    for name in (".wh.gone-by-tar", "gone-by-tar"):
        (merged / "tree" / name).unlink()
    same_times(merged)
    return Layers(base, changed, upper, tar, merged)


def make_base(tree: Tree, program: Path) -> None:
    tree.file("bin/show", program.read_bytes(), 0o755)
    tree.file("tree/kept", b"kept\n" * 50_000, 0o4755, owner=(1000, 5))
    tree.file("tree/capable", b"able", 0o755, capability=CAPABILITY)
    tree.file("tree/changed", b"old")
    tree.link("tree/link", "tree/kept")
    tree.symlink("tree/symlink", "../nowhere")
    tree.fifo("tree/fifo")
    tree.char("tree/char", 1, 3, owner=(1, 2))
    for name in ("file", "directory/file", "by-tar", "by-overlay/file"):
        tree.file(f"tree/gone-{name}")
    for name in ("opaque/below", "becomes-file/below", "é/" + "l" * 120):
        tree.file(f"tree/{name}")
    tree.symlink("tree/becomes-directory", "kept")
    tree.dir("tree/sticky", 0o1777, owner=(0, 5))
    same_times(tree.root)


def change(tree: Tree) -> None:
    tree.remove("tree/gone-file")
    tree.remove("tree/gone-directory")
    tree.remove("tree/becomes-file")
    tree.file("tree/becomes-file", b"no directory any more")
    tree.remove("tree/becomes-directory")
    tree.file("tree/becomes-directory/file")
    tree.file("tree/changed", b"new")  # only its content
    tree.meta("tree/sticky", mode=0o700)
    same_times(tree.root)


def change_mounted(tree: Tree) -> None:
    tree.remove("tree/gone-by-overlay")
    tree.remove("tree/opaque")
    tree.file("tree/opaque/above", b"nothing of what was below")
    tree.file("tree/changed", b"by overlay")
    tree.meta("tree/becomes-directory/file", owner=(7, 8))
    tree.file("tree/by-overlay")


def make_tar(place: Path) -> Path:
    tree = Tree(place / "for-tar")
    tree.file("tree/by-tar", b"from a tar")
    tree.file("tree/.wh.gone-by-tar", b"")
    tree.file("tree/kept-with-others", b"", xattrs={"user.note": b"noted"})
    same_times(tree.root)
    tar = place / "tar"
    run_quietly(["tar", "--format=posix", "--xattrs", "--numeric-owner", "-cf", tar, "-C", tree.root, "."])
    return tar


def same_times(root: Path) -> None:
    """Whole seconds, which is all that some tars and file systems have."""
    tree = Tree(root)
    for path in [root, *root.rglob("*")]:
        tree.meta(str(path.relative_to(root)), time=WHOLE)


@dataclass(slots=True)
class Workshop:
    """Exports the image, to each place once."""

    folder: Path
    layers: Layers
    store: Registry
    done: dict[tuple[Form, str], str]
    digests: dict[Form, str]

    def reference(self, form: Form, place: str) -> str:
        """Where the image is now, as podman and skopeo write it."""
        if (form, place) not in self.done:
            self.done[form, place] = self._export(form, place)
        return self.done[form, place]

    def digest(self, form: Form) -> str:
        """Of its manifest."""
        if form not in self.digests:
            self.reference(form, "docker")
        return self.digests[form]

    def name(self, form: Form, place: str) -> str:
        """HOST/REPOSITORY:TAG"""
        host = self.store.host if place == "docker" else "example.org"
        return f"{host}/app:{form}"

    def _export(self, form: Form, place: str) -> str:
        name, dest = self.name(form, place), self.folder / f"{place}-{form}"
        where = {
            "oci": f"type=oci,tar=false,dest={dest}",
            "oci-archive": f"type=oci,dest={dest}",
            "docker-archive": f"type=docker,dest={dest}",
            "docker": "type=image,push=true",
        }[place]
        prefetch = ["bin/show"] if form.compression == "estargz" else []
        with self.layers.image(prefetch=prefetch) as image:
            done = image.export(f"{where},name={name},{form.line}")
        assert done.descriptor is not None
        assert self.digests.setdefault(form, done.descriptor.digest) == done.descriptor.digest
        tails = {"oci": f"{dest}:{form}", "oci-archive": f"{dest}:{form}", "docker-archive": str(dest)}
        return f"{place}:{tails.get(place, f'//{name}')}"


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Registry]:
    if shutil.which(PROGRAM) is None:
        missing(f"{PROGRAM} is not installed, so there is nothing to push to")
    place = folder / "registry"
    place.mkdir()
    with registry(place) as running:
        yield running


@pytest.fixture(scope="module")
def workshop(folder: Path, layers: Layers, store: Registry) -> Workshop:
    place = folder / "exported"
    place.mkdir()
    return Workshop(place, layers, store, {}, {})


@pytest.fixture(scope="module")
def own(folder: Path) -> Iterator[Sandbox]:
    place = folder / "sandbox"
    place.mkdir()
    with sandbox(place) as made:
        yield made


@pytest.fixture(scope="module")
def pod(own: Sandbox) -> Iterator[Podman]:
    with podman(own) as tool:
        yield tool


@pytest.fixture(scope="module")
def daemon(own: Sandbox) -> Iterator[Containerd]:
    with containerd(own) as running:
        yield running


# ------------------------------------------------------------------------------------------------- skopeo, umoci


def skopeo(*words: str | Path) -> str:
    if shutil.which("skopeo") is None:
        missing("skopeo is not installed")
    return run("skopeo", "--insecure-policy", *words)


def inspect(reference: str, *options: str) -> str:
    insecure = ["--tls-verify=false"] if reference.startswith("docker:") else []
    return skopeo("inspect", *insecure, *options, reference)


def copy(source: str, dest: str) -> None:
    """An image with all its platforms, which must stay what it is to the byte."""
    options = ["--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"]
    skopeo("copy", *options, "--dest-oci-accept-uncompressed-layers", source, dest)


def manifest_digest(reference: str) -> str:
    return sha256(inspect(reference, "--raw").encode())


def blobs(layout: Path) -> dict[str, bytes]:
    """All of an OCI layout."""
    return {path.name: path.read_bytes() for path in (layout / "blobs/sha256").iterdir()}


@forms_by_place("oci", "oci-archive", "docker")
def test_skopeo_copies(workshop: Workshop, store: Registry, tmp_path: Path, form: Form, place: str) -> None:
    source, digest = workshop.reference(form, place), workshop.digest(form)
    dests = [f"dir:{tmp_path}/dir", f"docker://{store.host}/copied/{place}:{form}"]
    if not form.docker:
        dests.append(f"oci:{tmp_path}/oci:tag")
    for dest in dests:
        copy(source, dest)
        assert manifest_digest(dest) == digest
    manifest = json.loads((tmp_path / "dir/manifest.json").read_text())
    for blob in (manifest["config"], *manifest["layers"]):
        assert sha256((tmp_path / "dir" / blob["digest"].removeprefix("sha256:")).read_bytes()) == blob["digest"]


@pytest.mark.parametrize("form", OCI + DOCKER, ids=str)
def test_skopeo_reads_docker_archives(workshop: Workshop, tmp_path: Path, form: Form) -> None:
    """Which have no manifest of the image: its configuration, which names the layers, stays what it was."""
    skopeo("copy", workshop.reference(form, "docker-archive"), f"dir:{tmp_path}/dir")
    found = json.loads((tmp_path / "dir/manifest.json").read_text())
    pushed = json.loads(inspect(workshop.reference(form, "docker"), "--raw"))
    assert found["config"]["digest"] == pushed["config"]["digest"]
    assert len(found["layers"]) == 4


def test_skopeo_shows_the_configuration(layers: Layers, tmp_path: Path) -> None:
    image = layers.image().config(
        env={"A": "b"},
        workdir="/tree",
        user="7:8",
        labels={"org.example": "é"},
        exposed_ports=["80"],
        volumes=["/data"],
        stop_signal="SIGINT",
    )
    image.export(f"type=oci,dest={tmp_path}/image,source-date-epoch=1000000000")
    shown = json.loads(inspect(f"oci-archive:{tmp_path}/image", "--config"))
    assert shown["config"] == {
        "Entrypoint": ["/bin/show"],
        "Cmd": ["/tree"],
        "Env": ["A=b"],
        "WorkingDir": "/tree",
        "User": "7:8",
        "Labels": {"org.example": "é"},
        "ExposedPorts": {"80/tcp": {}},
        "Volumes": {"/data": {}},
        "StopSignal": "SIGINT",
    }
    assert (shown["architecture"], shown["os"], shown["created"]) == (HERE, "linux", "2001-09-09T01:46:40Z")
    assert len(shown["history"]) == len(shown["rootfs"]["diff_ids"]) == 4


@pytest.mark.parametrize(
    "form", [form for form in OCI if form.compression != "zstd"], ids=str
)  # which it does not know
def test_umoci_unpacks(workshop: Workshop, tmp_path: Path, form: Form) -> None:
    if shutil.which("umoci") is None:
        missing("umoci is not installed")
    layout = workshop.reference(form, "oci").removeprefix("oci:")
    run("umoci", "unpack", "--image", layout, tmp_path / "bundle")
    found = by_seconds(snapshot(tmp_path / "bundle/rootfs"))
    if form.compression == "estargz":
        for landmark in (b".prefetch.landmark", b".no.prefetch.landmark"):
            assert found.pop(landmark).size == 1
    assert found == by_seconds(snapshot(workshop.layers.merged))


def by_seconds(entries: dict[bytes, Found]) -> dict[bytes, Found]:
    return {name: entry._replace(mtime_ns=entry.mtime_ns // SECOND) for name, entry in entries.items() if name}


def test_files_alone(layers: Layers, tmp_path: Path) -> None:
    """Without an image around them: all layers applied, in a directory."""
    with layers.image() as image:
        image.export(f"type=local,dest={tmp_path}/files")
    assert by_seconds(snapshot(tmp_path / "files")) == by_seconds(snapshot(layers.merged))


def test_files_alone_in_a_tar(layers: Layers, tmp_path: Path) -> None:
    """Which has of extended attributes what the layer of a directory has: capabilities."""
    with layers.image() as image:
        image.export(f"type=tar,dest={tmp_path}/tar")
    (tmp_path / "files").mkdir()
    ways = ["--xattrs", "--xattrs-include=*", "--same-owner"]
    run("tar", *ways, "-xpf", tmp_path / "tar", "-C", tmp_path / "files")
    wanted = by_seconds(snapshot(layers.merged))
    assert wanted[b"tree/capable"].xattrs
    wanted[b"tree/kept-with-others"] = wanted[b"tree/kept-with-others"]._replace(xattrs=())
    assert by_seconds(snapshot(tmp_path / "files")) == wanted


# ------------------------------------------------------------------------------------------------- podman, containerd


@forms_by_place(*PLACES)
def test_podman_runs(workshop: Workshop, pod: Podman, form: Form, place: str) -> None:
    image = pod.pull(workshop.reference(form, place))
    assert seen(pod.run(image)) == expected(workshop.layers)


@forms_by_place("oci-archive", "docker-archive")
def test_containerd_imports_and_runs(workshop: Workshop, daemon: Containerd, form: Form, place: str) -> None:
    archive, name = workshop.reference(form, place).split(":")[1], workshop.name(form, place)
    daemon("images", "import", archive)
    check(daemon, name, workshop.digest(form))
    assert seen(daemon.run(name)) == expected(workshop.layers)
    daemon("images", "rm", "--sync", name)


@forms_by_place("docker")
def test_containerd_pulls_and_runs(workshop: Workshop, daemon: Containerd, form: Form, place: str) -> None:
    workshop.reference(form, place)
    name = workshop.name(form, place)
    daemon("images", "pull", "--plain-http", name)
    check(daemon, name, workshop.digest(form))
    assert seen(daemon.run(name)) == expected(workshop.layers)


@pytest.mark.parametrize(("kind", "words"), [("docker", "podman"), ("oci", "podman"), ("oci", "ctr")])
def test_loaded_from_a_pipe(layers: Layers, pod: Podman, daemon: Containerd, kind: str, words: str) -> None:
    """While the command writes it."""
    tree = ["--layer", str(layers.merged), "--entrypoint", "/bin/show", "--cmd", "/tree"]
    name = f"example.org/piped-{kind}-{words}:1"
    command = [*COMMAND, "image", "build", *tree, "--output", f"type={kind},name={name},compression=estargz"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writing:
        tool, load = (pod, ["load"]) if words == "podman" else (daemon, ["images", "import", "-"])
        tool(*load, stdin=writing.stdout)
        assert writing.stderr is not None
        said = json.loads(writing.stderr.read())
    assert writing.returncode == 0
    if words == "ctr":
        check(daemon, name, said["digest"])
    assert seen(tool.run(name)) == expected(layers)


@pytest.mark.parametrize("transport", ("docker-archive", "oci-archive", "dir", "oci"))
def test_saved_by_podman_and_converted(
    workshop: Workshop, pod: Podman, store: Registry, tmp_path: Path, transport: str
) -> None:
    formats = {"dir": "docker-dir", "oci": "oci-dir"}
    image = pod.pull(workshop.reference(Form("gzip"), "oci"))
    pod("save", f"--format={formats.get(transport, transport)}", f"--output={tmp_path}/saved", image)
    name = f"docker://{store.host}/saved:{transport}"
    convert(f"{transport}:{tmp_path}/saved", name, compression="estargz")
    assert seen(pod.run(pod.pull(name))) == expected(workshop.layers)


@pytest.mark.parametrize("compression", [form.compression for form in OCI])
def test_recompressed_by_podman_and_converted(
    workshop: Workshop, pod: Podman, store: Registry, tmp_path: Path, compression: str
) -> None:
    """Podman keeps layers inflated, and compresses an eStargz layer again with its table of contents behind the tar's end."""
    image = pod.pull(workshop.reference(Form("estargz"), "oci"))
    pod("save", "--format=oci-archive", f"--output={tmp_path}/saved", image)
    name = f"docker://{store.host}/recompressed:{compression}"
    convert(f"oci-archive:{tmp_path}/saved", name, compression=compression)
    assert seen(pod.run(pod.pull(name))) == expected(workshop.layers)


@pytest.mark.parametrize("transport", ("docker-archive", "oci-archive"))
def test_exported_by_containerd_and_converted(
    workshop: Workshop, daemon: Containerd, pod: Podman, store: Registry, tmp_path: Path, transport: str
) -> None:
    """It writes both in one."""
    origin = workshop.name(Form("zstd"), "docker")
    workshop.reference(Form("zstd"), "docker")
    daemon("images", "pull", "--plain-http", origin)
    daemon("images", "export", tmp_path / "exported", origin)
    name = f"docker://{store.host}/exported:{transport}"
    convert(f"{transport}:{tmp_path}/exported", name, compression="estargz")
    assert seen(pod.run(pod.pull(name))) == expected(workshop.layers)


def check(daemon: Containerd, name: str, digest: str) -> None:
    """All that an image leads to is there, and is unpacked."""
    (line,) = [words for row in daemon("images", "check").splitlines() if (words := row.split())[0] == name]
    assert (line[2], line[3], line[-1]) == (digest, "complete", "true")


def seen(printed: str) -> dict[str, dict[str, Any]]:
    return by_path(lines(printed))


def expected(layers: Layers) -> dict[str, dict[str, Any]]:
    return by_path(listing(layers.merged))


# ------------------------------------------------------------------------------------------------- pulled back, and converted


@pytest.mark.parametrize("form", OCI, ids=str)
def test_pulled_back(workshop: Workshop, tmp_path: Path, form: Form) -> None:
    """What was pushed is in the registry as it is in a layout on disk."""
    with Registries() as registries:
        done = convert(workshop.reference(form, "docker"), f"oci:{tmp_path}/back:tag", registries=registries)
    assert done.descriptor.digest == workshop.digest(form)
    assert blobs(tmp_path / "back") == blobs(Path(workshop.reference(form, "oci").split(":")[1]))


@pytest.fixture(scope="module")
def several(workshop: Workshop, store: Registry) -> str:
    """An image for two platforms, of which one is not this machine's."""
    manifests = []
    for architecture in (HERE, ELSEWHERE):
        with workshop.layers.image(architecture) as image:
            done = image.export(f"type=registry,name={store.host}/several:{architecture}")
        assert done.descriptor is not None
        manifests.append({**done.descriptor.document(), "platform": {"os": "linux", "architecture": architecture}})
    digest = store.push_manifest("several", {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests})
    return f"docker://{store.host}/several@{digest}"


@pytest.mark.parametrize("form", OCI + DOCKER, ids=str)
def test_several_platforms_converted(
    several: str, workshop: Workshop, store: Registry, pod: Podman, daemon: Containerd, tmp_path: Path, form: Form
) -> None:
    name = f"{store.host}/converted:{form}"
    done = convert(several, f"docker://{name}", compression=form.compression, oci_types=not form.docker)
    digest = done.descriptor.digest
    assert manifest_digest(f"docker://{name}") == digest
    copy(f"docker://{name}", f"dir:{tmp_path}/dir")
    assert manifest_digest(f"dir:{tmp_path}/dir") == digest
    for architecture in (HERE, ELSEWHERE):
        pulled = pod.pull(f"docker://{name}", "--arch", architecture)
        assert json.loads(pod("image", "inspect", pulled))[0]["Architecture"] == architecture
        if architecture == HERE:
            assert seen(pod.run(pulled)) == expected(workshop.layers)
    daemon("images", "pull", "--plain-http", "--all-platforms", name)
    check(daemon, name, digest)
    assert seen(daemon.run(name)) == expected(workshop.layers)


def test_several_platforms_in_one_archive(several: str, workshop: Workshop, daemon: Containerd, tmp_path: Path) -> None:
    done = convert(several, f"oci-archive:{tmp_path}/archive:example.org/several:1", compression="zstd")
    assert manifest_digest(f"oci-archive:{tmp_path}/archive") == done.descriptor.digest
    daemon("images", "import", "--all-platforms", tmp_path / "archive")
    check(daemon, "example.org/several:1", done.descriptor.digest)
    assert seen(daemon.run("example.org/several:1")) == expected(workshop.layers)


# ------------------------------------------------------------------------------------------------- BuildKit


BUILDKIT_CONFIG = """\
[registry."{host}"]
http = true
"""
DOCKERFILE = """\
FROM scratch
COPY layers/base /
COPY layers/added /tree/added
ENTRYPOINT ["/bin/show"]
CMD ["/tree"]
"""
REFERENCE = "vnd.docker.reference.digest"
COMPRESSIONS = [form.compression for form in OCI]


@dataclass(slots=True)
class BuildKit:
    """A daemon that builds from images of a registry, and pushes an image of its own there in every compression."""

    daemon: buildkitd.Daemon
    folder: Path
    """The context of its build."""
    store: Registry

    def run(self, image: str, *command: str) -> str:
        place = self.folder / "from"
        place.mkdir(exist_ok=True)
        return run_in_buildkit(self.daemon, place, image, *command)

    def push(self, compression: str, *, docker: bool = False) -> str:
        """A reference to its image, with the attestation that it makes by default; Docker's types have none."""
        name = f"{self.store.host}/buildkit:{'docker-' if docker else ''}{compression}"
        (self.folder / "Dockerfile").write_text(DOCKERFILE)
        (self.folder / "Dockerfile.dockerignore").write_text("*\n!layers/base\n!layers/added\n")
        options = ["--frontend", "dockerfile.v0", "--opt", f"platform=linux/{HERE},linux/{ELSEWHERE}"]
        options += [] if docker else ["--opt", "attest:provenance="]
        options += [part for kind in ("context", "dockerfile") for part in ("--local", f"{kind}={self.folder}")]
        output = f"type=image,name={name},push=true,compression={compression},force-compression=true"
        output += f",oci-mediatypes={str(not docker).lower()}"
        done = self.daemon.buildctl("build", *options, "--output", output, timeout=RUN_SECONDS)
        assert done.returncode == 0, done.stderr[-2000:]
        return f"docker://{name}"


@pytest.fixture(scope="module")
def buildkit(folder: Path, layers: Layers, store: Registry) -> Iterator[BuildKit]:
    if (reason := buildkitd.missing()) is not None:
        missing(reason)
    if not buildkitd.built():
        missing("buildkitd is not built: scripts/buildkit does it, in some minutes")
    Tree(folder / "layers/added").file("file", b"added")
    place = folder / "buildkit"
    place.mkdir()
    with buildkitd.Daemon(place, config=BUILDKIT_CONFIG.format(host=store.host)) as daemon:
        yield BuildKit(daemon, folder, store)


@forms_by_place("docker")
def test_buildkit_builds_from(workshop: Workshop, buildkit: BuildKit, form: Form, place: str) -> None:
    workshop.reference(form, place)
    image = f"{workshop.name(form, place)}@{workshop.digest(form)}"
    assert seen(buildkit.run(image, "/bin/show", "/tree")) == expected(workshop.layers)


@pytest.fixture(scope="module")
def pushed(buildkit: BuildKit) -> dict[str, str]:
    """References to BuildKit's image, by its compression."""
    return {compression: buildkit.push(compression) for compression in COMPRESSIONS}


@pytest.fixture(scope="module")
def as_pushed(pushed: dict[str, str], pod: Podman) -> dict[str, dict[str, Any]]:
    """What a container sees of it."""
    found = seen(pod.run(pod.pull(pushed["uncompressed"])))
    assert {"/tree/kept", "/tree/added/file"} < set(found)
    return found


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("origin", COMPRESSIONS)
def test_buildkits_image_converted(
    pushed: dict[str, str],
    as_pushed: dict[str, dict[str, Any]],
    store: Registry,
    pod: Podman,
    tmp_path: Path,
    origin: str,
    compression: str,
) -> None:
    name = f"docker://{store.host}/converted-from-{origin}:{compression}"
    done = convert(pushed[origin], name, compression=compression)
    assert manifest_digest(name) == done.descriptor.digest
    assert (done.descriptor.digest == manifest_digest(pushed[origin])) is (origin == compression)
    before, after = index_of(pushed[origin]), index_of(name)
    assert [one["platform"] for one in after] == [one["platform"] for one in before]
    images = [one["digest"] for one in after[:2]]
    assert [one["annotations"][REFERENCE] for one in after[2:]] == images
    attested = [inspect_by_digest(name, one) for one in after[2:]]
    assert [one.pop("subject")["digest"] for one in attested] == images
    original = [inspect_by_digest(pushed[origin], one) for one in before[2:]]
    assert attested == [{key: value for key, value in one.items() if key != "subject"} for one in original]
    copy(name, f"dir:{tmp_path}/dir")  # all blobs, statements too
    assert seen(pod.run(pod.pull(name))) == as_pushed
    if compression != "estargz":  # the tars are those that BuildKit made
        assert diff_ids(name) == diff_ids(pushed["uncompressed"])


def test_buildkits_docker_image_converted(
    buildkit: BuildKit, as_pushed: dict[str, dict[str, Any]], pod: Podman, store: Registry
) -> None:
    """A list of Docker's manifests, which have no attestations, becomes an index."""
    origin = buildkit.push("gzip", docker=True)
    assert json.loads(inspect(origin, "--raw"))["mediaType"] == MANIFEST_LIST
    done = convert(origin, f"docker://{store.host}/converted-from-docker", compression="estargz")
    image = f"{store.host}/converted-from-docker@{done.descriptor.digest}"
    assert [one["platform"] for one in index_of(f"docker://{image}")] == [one["platform"] for one in index_of(origin)]
    assert seen(pod.run(pod.pull(f"docker://{image}"))) == as_pushed
    assert seen(buildkit.run(image, "/bin/show", "/tree")) == as_pushed


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_image_on_top_of_buildkits(
    pushed: dict[str, str], layers: Layers, pod: Podman, tmp_path: Path, compression: str
) -> None:
    """Its layers stay, whatever the new one is compressed by, or else become the same."""
    tree = Tree(tmp_path / "tree")
    tree.file("tree/on-top", b"on top")
    tree.file("tree/.wh.kept", b"")
    with Image.open(pushed["estargz"]) as base:
        image = base.append(tree.root)
        for forced in (False, True):
            output = f"type=oci,dest={tmp_path}/image,compression={compression},force-compression={forced}"
            made = image.export(output)
            actions = [layer.action for layer in made.layers]
            assert actions == [("converted" if forced and compression != "estargz" else "copied")] * 2 + ["built"]
            found = seen(pod.run(pod.pull(f"oci-archive:{tmp_path}/image")))
            assert "/tree/kept" not in found
            assert found["/tree/on-top"]["crc32"] == zlib.crc32(b"on top")


def index_of(reference: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(inspect(reference, "--raw"))["manifests"]
    return found


def inspect_by_digest(reference: str, descriptor: dict[str, Any]) -> dict[str, Any]:
    repository = reference.rpartition(":")[0]
    found: dict[str, Any] = json.loads(inspect(f"{repository}@{descriptor['digest']}", "--raw"))
    return found


def diff_ids(reference: str) -> list[str]:
    """Of the image for this machine."""
    found: list[str] = json.loads(inspect(reference, "--config"))["rootfs"]["diff_ids"]
    return found

"""Small images, made by hand: every document and every file is written here, and nothing of the package's images."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tars import END, entry, sha256

import estargz

OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"
OCI_TYPES = {
    "index": f"{OCI}.index.v1+json",
    "manifest": f"{OCI}.manifest.v1+json",
    "config": f"{OCI}.config.v1+json",
    "uncompressed": f"{OCI}.layer.v1.tar",
    "gzip": f"{OCI}.layer.v1.tar+gzip",
    "estargz": f"{OCI}.layer.v1.tar+gzip",
}
DOCKER_TYPES = {
    "index": f"{DOCKER}.distribution.manifest.list.v2+json",
    "manifest": f"{DOCKER}.distribution.manifest.v2+json",
    "config": f"{DOCKER}.container.image.v1+json",
    "uncompressed": f"{DOCKER}.image.rootfs.diff.tar",
    "gzip": f"{DOCKER}.image.rootfs.diff.tar.gzip",
    "estargz": f"{DOCKER}.image.rootfs.diff.tar.gzip",
}
REF_NAME = "org.opencontainers.image.ref.name"
FILES = (
    {"etc/base": b"below\n", "etc/changed": b"old\n"},
    {"etc/changed": b"new\n", "usr/big": b"0123456789" * 20_000},
)


@dataclass
class Image:
    """A manifest or index with all that it leads to."""

    root: dict[str, Any]
    """Its descriptor."""
    blobs: dict[str, bytes]
    """By their digests: layers, configurations, manifests."""
    children: list[Image] = field(default_factory=list)

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.blobs[self.root["digest"]])
        return found


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A layer's tar: the files and the directories that they are in."""
    folders = sorted({parent.as_posix() for name in files for parent in Path(name).parents if parent != Path()})
    made = [entry(f"{name}/".encode(), type=b"5", mode=b"0000755\0") for name in folders]
    return b"".join(made + [entry(name.encode(), data) for name, data in files.items()]) + END


def image(
    layers: Sequence[Mapping[str, bytes]] = FILES,
    *,
    compression: str = "gzip",
    docker: bool = False,
    architecture: str = "amd64",
    annotations: Mapping[str, str] | None = None,
) -> Image:
    """An image for one platform, of layers with these files."""
    types = DOCKER_TYPES if docker else OCI_TYPES
    blobs, descriptors, diff_ids = {}, [], []
    for files in layers:
        sink = io.BytesIO()
        made = estargz.build(io.BytesIO(tar_of(files)), sink, compression=compression)
        blobs[made.digest] = sink.getvalue()
        descriptors.append(described(types[compression], sink.getvalue()))
        diff_ids.append(made.diff_id)
        if compression == "estargz" and not docker:
            descriptors[-1]["annotations"] = {
                key: value for key, value in made.annotations.items() if key != "containerd.io/uncompressed"
            }
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/usr/big"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created_by": f"layer {number}"} for number in range(len(diff_ids))],
        }
    ).encode()
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": types["manifest"],
        "config": described(types["config"], config),
        "layers": descriptors,
    }
    if annotations:
        manifest["annotations"] = dict(annotations)
    return _finished(manifest, blobs | {sha256(config): config})


def attestation(of: Image) -> Image:
    """What BuildKit says of an image beside it: a manifest whose layer is a statement."""
    statement = b'{"_type":"https://in-toto.io/Statement/v0.1"}'
    config = b'{"architecture":"unknown","os":"unknown","config":{},"rootfs":{"type":"layers","diff_ids":[]}}'
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_TYPES["manifest"],
        "config": described(OCI_TYPES["config"], config),
        "layers": [described("application/vnd.in-toto+json", statement)],
    }
    made = _finished(manifest, {sha256(config): config, sha256(statement): statement})
    made.root["annotations"] = {
        "vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": of.root["digest"],
    }
    made.root["platform"] = {"architecture": "unknown", "os": "unknown"}
    return made


def index(*images: Image, docker: bool = False) -> Image:
    """Images for several platforms, each with the platform of its configuration, and what is attested of them."""
    types = DOCKER_TYPES if docker else OCI_TYPES
    entries = []
    blobs: dict[str, bytes] = {}
    for one in images:
        config = json.loads(one.blobs[one.document["config"]["digest"]])
        platform = {"architecture": config["architecture"], "os": config["os"]}
        entries.append({"platform": platform, **one.root})
        blobs |= one.blobs
    document = {"schemaVersion": 2, "mediaType": types["index"], "manifests": entries}
    return _finished(document, blobs, list(images))


def several_platforms(*, docker: bool = False, attested: bool = False, compression: str = "gzip") -> Image:
    """For amd64 and arm64; they share their lowest layer."""
    made = [
        image((FILES[0], {"arch": name.encode()}), docker=docker, architecture=name, compression=compression)
        for name in ("amd64", "arm64")
    ]
    return index(*made, *(attestation(one) for one in made if attested), docker=docker)


def described(media_type: str, data: bytes) -> dict[str, Any]:
    """A descriptor of some bytes."""
    return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}


def _finished(document: dict[str, Any], blobs: dict[str, bytes], children: Sequence[Image] = ()) -> Image:
    text = json.dumps(document, indent=2).encode()
    return Image(described(document["mediaType"], text), blobs | {sha256(text): text}, list(children))


def layout_files(*named: tuple[str | None, Image]) -> dict[str, bytes]:
    """The files of an OCI layout with images under names."""
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
    entries = []
    for name, one in named:
        entries.append({**one.root, "annotations": {REF_NAME: name}} if name else one.root)
        files |= {f"blobs/{digest.replace(':', '/')}": data for digest, data in one.blobs.items()}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    return files


def docker_save_files(one: Image, *tags: str) -> dict[str, bytes]:
    """The files of an archive as docker save wrote it before its version 25, layers uncompressed."""
    config = one.blobs[one.document["config"]["digest"]]
    files = {f"{sha256(config)[7:]}.json": config}
    paths = []
    for number, layer in enumerate(one.document["layers"]):
        paths.append(f"{number:064x}/layer.tar")
        files[paths[-1]] = one.blobs[layer["digest"]]
    item = {"Config": f"{sha256(config)[7:]}.json", "RepoTags": list(tags) or None, "Layers": paths}
    return files | {"manifest.json": json.dumps([item]).encode()}


def write_files(files: Mapping[str, bytes], directory: Path) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def write_layout(directory: Path, one: Image, name: str | None = "v1") -> Path:
    """A layout with one image."""
    return write_files(layout_files((name, one)), directory)


def tar_of_files(files: Mapping[str, bytes]) -> bytes:
    """A tar of some files, as an archive is made of a layout's."""
    return b"".join(entry(name.encode(), data) for name, data in files.items()) + END

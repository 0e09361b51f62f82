"""The image commands: what they print, on files, pipes and terminals that may be gone, and how they fail."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry import registry
from sample_images import FILES, OCI_TYPES, image, several_platforms, tar_of, write_layout
from test_image_build import names_in, tree
from test_image_convert import TOC_DIGEST, read_json

from estargz.cli import main

pytestmark = pytest.mark.timeout(60)

Run = Callable[..., tuple[int, str, str]]
MIB = 1 << 20
PROGRAM = [sys.executable, "-m", "estargz"]
ROWS, COLUMNS = 8, 100


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: its exit status, and what it says."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run_command


# --------------------------------------------------------------------------------------------------------------------
# building and converting


def test_the_command_builds(scratch: Path, run: Run) -> None:
    tree(scratch / "lower", {"a": b"1"})
    tree(scratch / "a,b", {"a": b"1", "b": b"2"})
    write_layout(scratch / "base", image(), "v1")
    status, out, err = run(
        *("image", "build", "--from", f"oci:{scratch}/base:v1", "--layer", f'"{scratch}/a,b",lower={scratch}/lower'),
        *("--entrypoint", '["/bin/sh", "-c"]', "--cmd", "echo 'a b'", "--env", "A=1", "--label", "l=m", "--user", "1"),
        *("--output", f"type=oci,tar=false,dest={scratch}/out,name=x:1,compression=estargz", "--progress", "json"),
        "--json",
    )
    assert status == 0, err
    result = json.loads(out)
    assert [layer["action"] for layer in result["layers"]] == ["copied", "copied", "built"]
    manifest = read_json(scratch / "out", result["digest"])
    config = read_json(scratch / "out", manifest["config"]["digest"])["config"]
    assert (config["Entrypoint"], config["Cmd"], config["User"]) == (["/bin/sh", "-c"], ["echo", "a b"], "1")
    assert names_in(scratch / "out", manifest["layers"][2]) == {".no.prefetch.landmark", "b"}
    events = [json.loads(line) for line in err.splitlines()]
    assert {event["number"] for event in events if event["finished"]} == {0, 1, 2}


def test_the_command_converts(scratch: Path, run: Run) -> None:
    write_layout(scratch / "source", several_platforms(), "v1")
    status, out, _ = run(
        *("convert", f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1", "--compression", "estargz"),
        *("--cache", scratch / "cache"),
    )
    assert status == 0
    result = json.loads(out)
    assert [one["platform"] for one in result["images"]] == ["linux/amd64", "linux/arm64"]
    assert result["mediaType"] == OCI_TYPES["index"]
    status, out, _ = run("cache", "ls", "--cache", scratch / "cache", "--json")
    assert (status, len(out.splitlines())) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["convert", "alpine", "oci:x"], "is docker://alpine meant?"),
        (["convert", "oci:x:1", "oci:y:1", "--platform", "a/b", "--all-platforms"], "either --platform or"),
        (["convert", "oci:x:1", "oci:y:1", "--compression", "zstd", "--level", "20"], "from 0 to 19"),
        (["image", "build", "--layer", "x,lowr=y", "--output", "type=oci,dest=z"], "'lowr=y' is not known"),
        (["image", "build", "--layer", '"', "--output", "type=oci,dest=z"], "quote a field that has a comma"),
        (["image", "build", "--layer", 'rootfs,"', "--output", "type=oci,dest=z"], "quote a field that has a comma"),
        (["image", "build", "--layer", "", "--output", "type=oci,dest=z"], "begin with a directory, a tar, or -"),
        (
            ["image", "build", "--layer", ",lower=x", "--output", "type=oci,dest=z"],
            "begin with a directory, a tar, or -",
        ),
        (["image", "build", "--layer", "x,lower=", "--output", "type=oci,dest=z"], "lower=, overlay-lower="),
        (["image", "build", "--layer", "-", "--layer", "-,lower=x", "--output", "type=oci,dest=z"], "is one layer"),
        (["image", "build", "--platform", "foo", "--output", "type=oci,dest=z"], "'foo' is no platform: write OS/ARCH"),
        (["convert", "oci:x:1", "oci:y:1", "--platform", "foo"], "'foo' is no platform: write OS/ARCH"),
        (["image", "inspect", "oci:x:1", "--platform", "foo"], "'foo' is no platform: write OS/ARCH"),
        (["image", "inspect", "alpine"], "is docker://alpine meant?"),
        (["image", "build", "--output", "type=oci,dst=z"], "dest= meant?"),
        (["image", "build", "--env", "A", "--output", "type=oci,dest=z"], "--env KEY=VALUE"),
        (["image", "build", "--cmd", '["a", 1]', "--output", "type=oci,dest=z"], "no array of texts"),
        (["image", "build", "--entrypoint", "a 'b", "--output", "type=oci,dest=z"], "No closing quotation"),
        (["image", "build", "--platform", "amd64", "--output", "type=oci,dest=z"], "OS/ARCHITECTURE"),
        (["image", "build", "--output", "type=oci,compression=estargz,oci-mediatypes=false,dest=z"], "needs OCI"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str, run: Run) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def test_an_archive_on_standard_output(scratch: Path) -> None:
    source = tree(scratch / "one", {"a": b"1"})
    command = [sys.executable, "-m", "estargz", "image", "build", "--layer", source, "--output", "type=oci,name=x:1"]
    done = subprocess.run(command, capture_output=True, check=True)
    (scratch / "image.tar").write_bytes(done.stdout)
    subprocess.run(["skopeo", "inspect", f"oci-archive:{scratch}/image.tar"], capture_output=True, check=True)
    assert json.loads(done.stderr)["mediaType"] == OCI_TYPES["manifest"]


@pytest.mark.parametrize("memory", ["100", "40MiB"])
def test_memory_is_what_was_given(memory: str, scratch: Path, run: Run) -> None:
    command = ("image", "build", "--layer", tree(scratch / "one", {"a": b"1"}), "--memory", memory, "--threads", 1)
    status, _, err = run(*command, "--output", f"type=oci,dest={scratch}/out.tar,compression=estargz")
    if memory == "100":
        assert (status, "a memory budget of 100 bytes is too small" in err) == (2, True)
    else:
        assert status == 0, err


# --------------------------------------------------------------------------------------------------------------------
# standard streams


def test_standard_input_has_a_name(scratch: Path) -> None:
    command = [*PROGRAM, "image", "build", "--layer", "-", "--output", f"type=oci,dest={scratch}/out.tar"]
    command += ["--progress", "json"]
    done = subprocess.run(command, input=tar_of(FILES[0]), capture_output=True, check=True)
    assert {json.loads(line)["name"] for line in done.stderr.splitlines()} == {"standard input"}
    done = subprocess.run(command, input=b"no tar", capture_output=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.decode()
        .splitlines()[-1]
        .startswith("estargz: error: standard input: the tar stream ends too early")
    )


@pytest.mark.parametrize("kind", ["oci", "docker", "tar"])
def test_an_archive_has_nowhere_to_go(kind: str, scratch: Path) -> None:
    command = [*PROGRAM, "image", "build", "--layer", tree(scratch / "one", {"a": b"1"}), "--output", f"type={kind}"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "standard output is closed" in done.stderr


def test_the_result_cannot_be_printed(scratch: Path) -> None:
    source, archive = tree(scratch / "one", {"a": b"1"}), scratch / "made.tar"
    commands = {
        f"oci-archive:{archive}": ["image", "build", "--layer", source, "--output", f"type=oci,dest={archive}"],
        f"oci:{scratch}/made:1": ["convert", f"oci-archive:{archive}", f"oci:{scratch}/made:1"],
        f"{scratch}/made.blob": ["build", source, "-o", f"{scratch}/made.blob", "--quiet"],
    }
    for made, command in commands.items():
        with open("/dev/full", "wb") as full:
            done = subprocess.run([*PROGRAM, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == (
            f"estargz: error: {made} was written, but what describes it cannot be printed: standard output: "
            "No space left on device\n"
        )
        assert Path(made.removeprefix("oci-archive:").removeprefix("oci:").removesuffix(":1")).exists()


@pytest.mark.parametrize("mode", ["json", "auto"])
def test_nobody_follows_the_progress_any_longer(mode: str, scratch: Path) -> None:
    """``auto`` on a terminal that is hung up, ``json`` through a pipe that is closed, after something was read there."""
    ours, theirs = os.pipe() if mode == "json" else pty.openpty()
    other = f"{tree(scratch / 'one', {'a': b'1'})},prefetch=missing,allow-missing"  # there is a warning at the end
    command = [*PROGRAM, "image", "build", "--layer", "-", "--layer", other, "--progress", mode, "--json"]
    command += ["--output", f"type=oci,dest={scratch}/out.tar,compression=estargz"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs) as child:
        os.close(theirs)
        assert child.stdin is not None and child.stdout is not None
        tar = tar_of({str(number): os.urandom(MIB) for number in range(24)})
        child.stdin.write(tar[: 20 * MIB])
        child.stdin.flush()
        assert os.read(ours, 10)
        os.close(ours)
        child.stdin.write(tar[20 * MIB :])
        child.stdin.close()
        result = json.loads(child.stdout.read())
        assert child.wait(60) == 0
    assert result["names"] == [f"oci-archive:{scratch}/out.tar"]
    subprocess.run(["skopeo", "inspect", *result["names"]], capture_output=True, check=True)


# --------------------------------------------------------------------------------------------------------------------
# terminals


class Screen:
    """What a terminal shows that knows the controls which the bars use."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row = self._column = 0

    def feed(self, text: str) -> list[str]:
        for control, plain in re.findall(r"(\x1b\[\??\d*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", text):
            if plain:
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + plain + line[self._column + len(plain) :]
                self._column += len(plain)
                assert self._column <= COLUMNS
            else:
                self._control(control)
        return [line.rstrip() for line in self.lines]

    def _control(self, control: str) -> None:
        if control == "\r":
            self._column = 0
        elif control == "\n":
            self._row += 1
            self.lines += [""] * (self._row == len(self.lines))
        elif control == "\x1b[J":
            self.lines[self._row :] = [self.lines[self._row][: self._column]]
        elif up := re.fullmatch(r"\x1b\[([1-9]\d*)A", control):
            self._row -= int(up[1])
            assert self._row >= 0
        else:
            assert control in ("\x1b[?7l", "\x1b[?7h")  # whether long lines are wrapped


def on_terminal(command: list[str]) -> tuple[int, str, str]:
    """A command whose standard error is a terminal: its status, its standard output, and what the terminal was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as child:
        os.close(theirs)
        sent = b""
        try:
            while data := os.read(ours, 65536):
                sent += data
        except OSError:  # how a terminal ends
            os.close(ours)
        assert child.stdout is not None
        return child.wait(60), child.stdout.read(), sent.decode()


def told(*lines: str) -> list[str]:
    """Runs what tells of layers by events that these lines report."""
    program = [
        "import sys",
        "from estargz.cli.progress import layer_progress",
        "from estargz.image.progress import Event",
        "with layer_progress('auto') as report:",
        *(f"    {line}" for line in lines),
    ]
    return [sys.executable, "-c", "\n".join(program)]


DIGEST = "sha256:" + "ab" * 32
SEVERAL = (
    f"report(Event(0, {DIGEST!r}, 'copy', 0, 10_000_000))",
    "report(Event(1, 'some/rootfs', 'build', 1_000_000, None))",
    f"report(Event(0, {DIGEST!r}, 'copy', 5_000_000, 10_000_000))",
    "report(Event(2, 'a\\x1b[2J', 'convert', 2_000_000, None))",
    "report(Event(1, 'some/rootfs', 'build', 3_000_000, None))",
)


def test_bars_of_several_layers() -> None:
    """What is seen after all these events, and nothing else of them."""
    status, _, sent = on_terminal(
        told(*SEVERAL, "print('!', file=sys.stderr, end='', flush=True)", "import os; os._exit(3)")
    )
    assert status == 3
    assert Screen().feed(sent) == [
        "abababababab             copy       50% of 10.0 MB [##########          ]",
        "some/rootfs              build     3.0 MB",
        r"'a\x1b[2J'               convert   2.0 MB",
        "!",
    ]


def test_a_line_stays_of_each_finished_layer() -> None:
    finished = (
        "report(Event(1, 'some/rootfs', 'reuse', 7_000_000, 7_000_000, True))",
        f"report(Event(0, {DIGEST!r}, 'copy', 10_000_000, 10_000_000, True))",
        "report(Event(3, 'at once', 'build', 1_000, 1_000, True))",
    )
    lines = [
        "some/rootfs              reused    7.0 MB",
        "abababababab             copied    10.0 MB",
        "at once                  built     0.0 MB",
    ]
    last = "report(Event(2, 'a', 'convert', 9_000_000, 9_000_000, True))"
    _, _, sent = on_terminal(told(*SEVERAL, *finished, last))
    assert Screen().feed(sent) == [*lines, "a                        converted 9.0 MB", ""]
    _, _, sent = on_terminal(told(*SEVERAL, *finished, "sys.exit('given up')"))  # the third never ends
    assert Screen().feed(sent) == [*lines, "given up", ""]


def test_more_layers_than_lines() -> None:
    _, _, sent = on_terminal(told(f"for number in range({3 * ROWS}): report(Event(number, 'a', 'build', 1, None))"))
    assert max(len(Screen().feed(sent[:end])) for end in range(len(sent))) == ROWS
    assert Screen().feed(sent) == [""]


def test_a_slow_build_on_a_terminal(scratch: Path) -> None:
    write_layout(scratch / "base", image(), "v1")
    (scratch / "layer.tar").write_bytes(tar_of({str(number): os.urandom(MIB) for number in range(24)}))
    build = [*PROGRAM, "image", "build", "--from", f"oci:{scratch}/base:v1", "--json", "--layer", "-"]
    build += ["--layer", f"{scratch}/layer.tar", "--output", f"type=oci,dest={scratch}/out.tar,compression=estargz"]
    pieces = 'for piece in 0 1 2 3; do dd if="$0" bs=8M count=1 skip=$piece status=none; sleep 0.2; done'
    status, out, sent = on_terminal(["sh", "-c", f'({pieces}) | "$@"', str(scratch / "layer.tar"), *build])
    assert status == 0, sent
    assert len(json.loads(out)["layers"]) == 4
    assert sent.count("standard input           build") > 1
    shown = Screen().feed(sent)
    assert shown[-1] == ""
    assert sorted(line.split()[-3:] for line in shown[:-1]) == sorted(
        [["copied", "0.0", "MB"]] * 2 + [["built", f"{os.path.getsize(scratch / 'layer.tar') / 1e6:.1f}", "MB"]] * 2
    )


# --------------------------------------------------------------------------------------------------------------------
# inspecting


def skopeo(*arguments: str) -> Any:
    return json.loads(subprocess.run(["skopeo", "inspect", *arguments], capture_output=True, check=True).stdout)


@pytest.mark.parametrize("compression", ["uncompressed", "gzip", "estargz", "zstd"])
def test_an_image_is_what_skopeo_says(compression: str, scratch: Path, run: Run) -> None:
    write_layout(scratch / "source", image(), "v1")
    reference = f"oci:{scratch}/image:v1"
    assert run("convert", f"oci:{scratch}/source:v1", reference, "--compression", compression)[0] == 0
    status, out, _ = run("image", "inspect", reference, "--json")
    assert status == 0
    found, said, raw, config = json.loads(out), *(skopeo(*how, reference) for how in ((), ("--raw",), ("--config",)))
    (only,) = found["images"]
    assert found["digest"] == only["digest"] == said["Digest"]
    assert found["platforms"] == [f"{said['Os']}/{said['Architecture']}"]
    assert [layer["digest"] for layer in only["layers"]] == said["Layers"]
    assert [{key: layer[key] for key in ("mediaType", "digest", "size")} for layer in only["layers"]] == [
        {key: layer[key] for key in ("mediaType", "digest", "size")} for layer in raw["layers"]
    ]
    assert [layer["diffID"] for layer in only["layers"]] == config["rootfs"]["diff_ids"]
    assert [layer["tocDigest"] for layer in only["layers"]] == [
        layer.get("annotations", {}).get(TOC_DIGEST) for layer in raw["layers"]
    ]
    assert {layer["kind"] for layer in only["layers"]} == {compression}
    assert only["config"]["cmd"] == config["config"]["Cmd"]
    assert only["config"]["env"] == len(said["Env"])
    assert only["config"]["entrypoint"] is only["config"]["created"] is None


def test_an_index_of_a_registry(scratch: Path, run: Run) -> None:
    (scratch / "registry").mkdir()
    write_layout(scratch / "source", several_platforms(attested=True, compression="estargz"), "v1")
    with registry(scratch / "registry") as server:
        reference = f"docker://{server.host}/app:1"
        assert run("convert", f"oci:{scratch}/source:v1", reference)[0] == 0
        found = json.loads(run("image", "inspect", reference, "--json")[1])
        raw = skopeo("--tls-verify=false", "--raw", reference)
        assert found["mediaType"] == raw["mediaType"] == OCI_TYPES["index"]
        assert [(one["platform"], one["digest"]) for one in found["images"]] == [
            (f"linux/{one['platform']['architecture']}", one["digest"]) for one in raw["manifests"][:2]
        ]
        assert [one["digest"] for one in found["others"]] == [one["digest"] for one in raw["manifests"][2:]]
        only = json.loads(run("image", "inspect", reference, "--platform", "linux/arm64", "--json")[1])
        said = skopeo("--tls-verify=false", "--override-arch", "arm64", reference)
        assert [layer["digest"] for layer in only["images"][0]["layers"]] == said["Layers"]
        assert only["platforms"] == ["linux/arm64"]
        assert {layer["kind"] for one in found["images"] for layer in one["layers"]} == {"estargz"}


def test_an_image_for_people(scratch: Path, run: Run) -> None:
    source, output = tree(scratch / "one", {"a": b"1"}), f"type=oci,tar=false,dest={scratch}/out,compression=estargz"
    command = (
        "image",
        "build",
        "--platform",
        "linux/arm64",
        "--layer",
        source,
        "--entrypoint",
        '["/a\\u001b[2J", "-v"]',
    )
    made = json.loads(run(*command, "--output", f"{output},name=example.com/app:1")[1])
    status, out, _ = run("image", "inspect", f"oci:{scratch}/out:example.com/app:1")
    assert status == 0
    (layer,) = made["layers"]
    config = read_json(scratch / "out", made["digest"])["config"]["digest"]
    toc = layer["annotations"][TOC_DIGEST]
    assert out.splitlines() == [
        f"name:         oci:{scratch}/out:example.com/app:1",
        f"type:         {OCI_TYPES['manifest']}",
        f"digest:       {made['digest']}",
        "platforms:    linux/arm64",
        "",
        "platform:     linux/arm64",
        f"manifest:     {made['digest']}",
        f"config:       {config}",
        'entrypoint:   ["/a\\\\u001b[2J", "-v"]',
        "cmd:          none",
        "env:          0 variables",
        "created:      1970-01-01T00:00:00Z",
        "layer                bytes  kind          DiffID        TOC",
        f"{layer['digest'][7:19]}  {layer['size']:>12}  estargz       {layer['diffID'][7:19]}  {toc[7:19]}",
    ]

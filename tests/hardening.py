"""What a compiled stage must be like, judged by binutils: what HARDENED in setup.py asks of the compiler and the linker."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

X86 = platform.machine() == "x86_64"
NEEDED = re.compile(r"(libc|libpthread|libisal|libdeflate|libcrypto|libzstd|ld-linux-\S+)\.so\.\d+")


def read(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True, timeout=60).stdout


def sanitized(stage: Path) -> bool:
    return re.search(r"NEEDED.*lib\w+san\.so", read("readelf", "-d", stage)) is not None


def faults(stage: Path, strange: Iterable[str] = ()) -> list[str]:
    """What is wrong with it; `strange` are the paths that it must not name."""
    found = [*segment_faults(stage), *linking_faults(stage), *symbol_faults(stage), *content_faults(stage, strange)]
    return [f"{stage.name}: {what}" for what in found]


def segment_faults(stage: Path) -> Iterator[str]:
    text = read("readelf", "-lW", stage)
    flags: list[tuple[str, str]] = re.findall(r"^  ([A-Z_]+) +(?:0x\w+ +){5}([RWE ]{3})", text, re.MULTILINE)
    yield from (f"a {kind} segment can be both written and executed" for kind, flag in flags if {"W", "E"} <= {*flag})
    kinds = {kind for kind, _ in flags}
    if "GNU_RELRO" not in kinds:
        yield "what the loader resolves stays writable: no RELRO"
    if "GNU_STACK" not in kinds:
        yield "the stack may be executed: no GNU_STACK"


def linking_faults(stage: Path) -> Iterator[str]:
    text = read("readelf", "-dW", stage)
    if "BIND_NOW" not in text:
        yield "functions are resolved late, in memory that stays writable: no BIND_NOW"
    yield from (f"it has a {tag}" for tag in ("TEXTREL", "RPATH", "RUNPATH") if f"({tag})" in text)
    needed: list[str] = re.findall(r"NEEDED.*\[(.+)\]", text)
    yield from (f"it is linked with {library}" for library in needed if not NEEDED.fullmatch(library))
    if X86 and not re.search(r"x86 feature:.*SHSTK", read("readelf", "-nW", stage)):
        yield "it keeps the process from having shadow stacks: no SHSTK"


def symbol_faults(stage: Path) -> Iterator[str]:
    init = f"PyInit_{stage.name.partition('.')[0]}"
    exported = read("nm", "-D", "--defined-only", "--format=just-symbols", stage).split()
    if exported != [init]:
        yield f"it exports {' '.join(exported)}, and only {init} is anybody's business"
    if "__stack_chk_fail" not in imported(stage):
        yield "no stack is protected"
    if X86 and not re.search(r"endbr64", read("objdump", "-d", f"--disassemble={init}", stage)):
        yield "where a jump may lead is not marked: no endbr64"


def content_faults(stage: Path, strange: Iterable[str]) -> Iterator[str]:
    if ".debug_" in read("readelf", "-SW", stage):
        yield "it has debug information"
    content = stage.read_bytes()
    yield from (f"it names {path}" for path in strange if path.encode() in content)


def imported(stage: Path) -> set[str]:
    names = read("nm", "-D", "--undefined-only", "--format=just-symbols", stage).split()
    return {name.partition("@")[0] for name in names}

"""What figures depend on and have to be reported with: the machine, the libraries, the tools, the commit."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import REPOSITORY, own_peak

LIBRARIES = ("libisal", "libdeflate", "libcrypto", "libzstd")
SETTINGS = ("CONTAINERD_DISABLE_IGZIP", "CONTAINERD_DISABLE_PIGZ", "GOMAXPROCS", "GOGC", "SOURCE_DATE_EPOCH")
TOOLS = ("tar", "pigz", "igzip", "zstd", "runc")
HELPERS = ("igzip", "unpigz")

# Asked of another interpreter, so that this one stays small: the peaks it measures begin with its own.
ASK = """
import importlib.metadata, importlib.util, json, ssl, estargz
from estargz import _codec, _sha256
print(json.dumps({"estargz": estargz.__version__, "isal": _codec.ISAL_VERSION, "sha256_lanes": _sha256.lanes(),
                  "python_openssl": ssl.OPENSSL_VERSION,
                  "python_isal": importlib.util.find_spec("isal") and importlib.metadata.version("isal")}))
"""


def facts(peer: Path | None) -> dict[str, Any]:
    """Everything but the figures."""
    return {
        "date": now(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "package": json.loads(said(sys.executable, "-c", ASK) or "{}"),
        "libraries": {name: said("pkg-config", "--modversion", name) for name in LIBRARIES},
        "tools": {name: (said(name, "--version") or "").partition("\n")[0] or None for name in TOOLS},
        "peer": json.loads(said(str(peer), "version") or "{}") if peer else None,
        "on_path": {name: shutil.which(name) is not None for name in HELPERS},
        "environment": {name: os.environ.get(name) for name in SETTINGS},
        "load_average": load(),
        "peak_floor_bytes": own_peak(),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def said(*command: str) -> str | None:
    """What a command prints; None when it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """The commit's hash, marked when the files are not those of the commit."""
    found = said("git", "rev-parse", "HEAD")
    return f"{found}-modified" if found and said("git", "status", "--porcelain") else found


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def load() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def headline(found: dict[str, Any]) -> str:
    """The facts in a few lines, for people."""
    peer = found["peer"] or {}
    modules = peer.get("modules", {})
    go = ", ".join(f"{path.rpartition('/')[2]} {version}" for path, version in modules.items() if wanted(path))
    helpers = ", ".join(f"{name} {'on' if there else 'not on'} PATH" for name, there in found["on_path"].items())
    libraries = ", ".join(f"{name} {version or 'unknown'}" for name, version in found["libraries"].items())
    return "\n".join(
        [
            f"{found['cpu']}, {found['cpus']} CPUs, Linux {found['kernel']}, load {found['load_average'][0]}",
            f"estargz at {found['commit'] or 'no commit'}, Python {found['python']}, {libraries}",
            f"{peer.get('go', 'no Go peer')}{': ' + go if go else ''}; {helpers}",
        ]
    )


def wanted(path: str) -> bool:
    return path.endswith(("moby/buildkit", "stargz-snapshotter/estargz"))

"""Container image layers that runtimes can pull lazily, built in one pass.

write: source -> tar headers and payloads -> batches -> members x threads -> sink -> table of contents -> Layer
images: layers -> configuration, manifest -> registry | layout | archive; and back, in another compression
read:  blob -> footer -> table of contents -> entry -> chunk -> member -> verified bytes
"""

from __future__ import annotations

import os
from _thread import RLock
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from estargz.errors import (
    BlobError,
    ChangedError,
    EstargzError,
    ImageError,
    RangeError,
    RegistryError,
    SinkError,
    SourceError,
    TarError,
    UsageError,
    VerificationError,
)
from estargz.layer import Layer

if TYPE_CHECKING:
    from estargz.image.convert import Converted, convert
    from estargz.image.export import Exported
    from estargz.image.image import Image
    from estargz.image.output import Output
    from estargz.image.variants import VariantStore
    from estargz.reading.blob import Blob, open
    from estargz.reading.extracting import Extracted, extract
    from estargz.reading.verifying import Report, verify
    from estargz.recording import Recorded, record
    from estargz.registry.client import Registries
    from estargz.writing.access_log import AccessLog, PathPattern, match, read_access_log
    from estargz.writing.building import build
    from estargz.writing.pool import Pool
    from estargz.writing.writer import Compressor, Writer

__version__ = "0.1.0"


def _refuse_subinterpreters() -> None:
    """The compiled stages have one state a process, and call back by what belongs to the main interpreter."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # from CPython 3.13 on, and before
        with suppress(ImportError):
            interpreters = import_module(name)
            if interpreters.get_current() != interpreters.get_main():
                raise EstargzError(
                    "estargz runs in a process's main interpreter only, and this is a subinterpreter; use threads or "
                    "processes (of mod_wsgi: WSGIApplicationGroup %{GLOBAL})"
                )
            return


__all__ = [
    "AccessLog",
    "Blob",
    "BlobError",
    "ChangedError",
    "Compressor",
    "Converted",
    "EstargzError",
    "Exported",
    "Extracted",
    "Image",
    "ImageError",
    "Layer",
    "Output",
    "PathPattern",
    "Pool",
    "RangeError",
    "Recorded",
    "Registries",
    "RegistryError",
    "Report",
    "SinkError",
    "SourceError",
    "TarError",
    "UsageError",
    "VariantStore",
    "VerificationError",
    "Writer",
    "build",
    "convert",
    "extract",
    "match",
    "open",
    "read_access_log",
    "record",
    "verify",
]

# name -> module: the compiled stages are loaded with the first of these that is used
_LAZY = {
    "AccessLog": "estargz.writing.access_log",
    "Blob": "estargz.reading.blob",
    "Compressor": "estargz.writing.writer",
    "Converted": "estargz.image.convert",
    "Exported": "estargz.image.export",
    "Extracted": "estargz.reading.extracting",
    "Image": "estargz.image.image",
    "Output": "estargz.image.output",
    "PathPattern": "estargz.writing.access_log",
    "Pool": "estargz.writing.pool",
    "Recorded": "estargz.recording",
    "Registries": "estargz.registry.client",
    "Report": "estargz.reading.verifying",
    "VariantStore": "estargz.image.variants",
    "Writer": "estargz.writing.writer",
    "build": "estargz.writing.building",
    "convert": "estargz.image.convert",
    "extract": "estargz.reading.extracting",
    "match": "estargz.writing.access_log",
    "open": "estargz.reading.blob",
    "read_access_log": "estargz.writing.access_log",
    "record": "estargz.recording",
    "verify": "estargz.reading.verifying",
}


# A child that is forked while another thread is in the midst of an import would wait for that import for ever.
_importing = RLock()
os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _refuse_subinterpreters()
    with _importing:
        value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

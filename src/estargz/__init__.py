"""Container image layers that runtimes can pull lazily, built in one pass.

    write: source -> tar headers and payloads -> batches -> members x threads -> sink -> table of contents -> Layer
    read:  blob -> footer -> table of contents -> entry -> chunk -> member -> verified bytes
"""

from estargz.build import build
from estargz.errors import (
    BlobError,
    ChangedError,
    EstargzError,
    SinkError,
    SourceError,
    TarError,
    UsageError,
    VerificationError,
)
from estargz.layer import Layer
from estargz.writer import Compressor, Writer

__version__ = "0.1.0"

__all__ = [
    "BlobError",
    "ChangedError",
    "Compressor",
    "EstargzError",
    "Layer",
    "SinkError",
    "SourceError",
    "TarError",
    "UsageError",
    "VerificationError",
    "Writer",
    "build",
]

"""Imported by every interpreter of a sanitized build before all else, by a .pth file."""

from __future__ import annotations

import ctypes
import os

# The sanitizer is loaded by now. Programs that are no interpreters of this build shall not have it.
os.environ.pop("LD_PRELOAD", None)

# Beside ASan's library UBSan's sets the path of ASan's reports instead of its own, for both have a function of that name.
if path := os.environ.get("ESTARGZ_UBSAN_REPORTS"):
    ctypes.CDLL("libubsan.so.1").__sanitizer_set_report_path(path.encode())

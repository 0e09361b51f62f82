ISAL_VERSION: str
LIBDEFLATE_VERSION: str
ZSTD_VERSION: str

def encoder(compression: str, level: int) -> str: ...

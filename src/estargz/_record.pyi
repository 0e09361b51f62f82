NO_FOLDER: int
NO_FILTER: int
NO_PROGRAM: int
NO_CONTINUE: int

def run(
    programs: list[bytes],
    arguments: list[bytes],
    environment: list[bytes],
    folder: bytes | None,
    root: bytes,
    *,
    until_exit: bool,
    adopt_orphans: bool,
) -> tuple[list[bytes], int, int, int, int]: ...

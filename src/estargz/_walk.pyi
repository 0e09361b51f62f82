from estargz._layer import LayerBuilder

class TreeWalk:
    def __init__(
        self,
        builder: LayerBuilder,
        upper: int,
        lowers: list[int],
        *,
        overlay: bool,
        epoch: int | None,
        landmarks_reserved: bool,
    ) -> None: ...
    def run(self) -> None: ...

"""An image to be: layers and a configuration, on top of another image or of nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from estargz.errors import UsageError
from estargz.image.layers import NewLayer, StoredLayer
from estargz.image.model import ImageConfig, Platform
from estargz.image.reference import Reference
from estargz.image.store import ImageSource, open_source
from estargz.image.tree import read_image
from estargz.writing.source import PathLike, Readable

if TYPE_CHECKING:
    from estargz.image.export import Exported
    from estargz.image.output import Output
    from estargz.image.progress import Report
    from estargz.image.variants import VariantStore
    from estargz.registry.client import Registries
    from estargz.writing.pool import Pool

__all__ = ["Image"]


@dataclass(frozen=True, slots=True)
class Image:
    """One platform's image that can be added to and exported. ``append`` and ``config`` give a new one, so that several can be
    made from the same beginning.

    As a context manager it frees what the image that it began with is read from.
    """

    base: Sequence[StoredLayer]
    """The layers of the image that it began with, the lowest first."""
    added: Sequence[NewLayer]
    """What was appended."""
    settings: ImageConfig
    """Its configuration, as far as it is known before the layers are made."""
    registries: Registries = field(repr=False)
    """Connections and credentials."""
    _source: ImageSource | None = field(default=None, repr=False)
    _owned: Registries | None = field(default=None, repr=False)  # closed with the image

    @classmethod
    def open(
        cls,
        reference: str | Reference,
        *,
        platform: str | Platform | None = None,
        registries: Registries | None = None,
    ) -> Self:
        """Begins with an image that exists. Its layers are read when this one is exported.

        reference:   as skopeo writes them (``estargz.image.reference``)
        platform:    which of several; None: this machine's
        registries:  connections and credentials; None: new ones

        Raises UsageError, ImageError, RegistryError.
        """
        registries, own = _registries(registries)
        source = open_source(reference if isinstance(reference, Reference) else Reference.parse(reference), registries)
        try:
            image = read_image(source, None if platform is None else Platform.parse(platform))
            return cls(image.layers(source), (), image.config, registries, source, own)
        except BaseException:
            source.close()
            if own is not None:
                own.close()
            raise

    @classmethod
    def new(cls, platform: str | Platform | None = None, *, registries: Registries | None = None) -> Self:
        """Begins with nothing. platform: None: this machine's."""
        chosen = Platform.host() if platform is None else Platform.parse(platform)
        registries, own = _registries(registries)
        return cls((), (), ImageConfig.new(chosen), registries, None, own)

    def append(
        self,
        source: PathLike | Readable,
        *,
        lower: PathLike | None = None,
        overlay_lower: Sequence[PathLike] | None = None,
        prefetch: Sequence[str] = (),
        allow_missing: bool = False,
        landmark: bool = True,
        created_by: str = "estargz",
    ) -> Self:
        """With one more layer on top. The arguments are those of ``estargz.build``, which is run when the image is exported;
        ``prefetch`` is for images that are exported with compression=estargz. created_by: for the image's history.
        """
        layer = NewLayer(
            source,
            lower=lower,
            overlay_lower=overlay_lower,
            prefetch=tuple(prefetch),
            allow_missing=allow_missing,
            landmark=landmark,
        )
        step = {"created_by": created_by}
        settings = replace(self.settings, history=[*self.settings.history, step])
        return replace(self, added=(*self.added, layer), settings=settings)

    def config(
        self,
        *,
        entrypoint: Sequence[str] | None = None,
        cmd: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        labels: Mapping[str, str] | None = None,
        exposed_ports: Sequence[str] | None = None,
        volumes: Sequence[str] | None = None,
        stop_signal: str | None = None,
        platform: str | Platform | None = None,
    ) -> Self:
        """With other settings for what is run; None leaves one as it is.

        An ``entrypoint`` without a ``cmd`` removes the base's command, as in a Dockerfile. ``env`` and ``labels`` are added to
        those that are there. ``exposed_ports`` read ``80`` or ``80/tcp``. Raises UsageError.
        """
        run = dict(self.settings.settings)
        if entrypoint is not None:
            run["Entrypoint"] = _words(entrypoint, "entrypoint")
            run.pop("Cmd", None)
        if cmd is not None:
            run["Cmd"] = _words(cmd, "cmd")
        if env:
            run["Env"] = _environment(run.get("Env"), env)
        if labels:
            run["Labels"] = {**(run.get("Labels") or {}), **labels}
        for key, value in (("WorkingDir", workdir), ("User", user), ("StopSignal", stop_signal)):
            if value is not None:
                run[key] = value
        if exposed_ports is not None:
            run["ExposedPorts"] = {**(run.get("ExposedPorts") or {}), **{_port(port): {} for port in exposed_ports}}
        if volumes is not None:
            if not all(volumes):
                raise UsageError("a volume is a path, not an empty text")
            run["Volumes"] = {**(run.get("Volumes") or {}), **{volume: {} for volume in volumes}}
        settings = replace(self.settings, raw={**self.settings.raw, "config": run})
        if platform is not None:
            settings = replace(settings, platform=Platform.parse(platform))
        return replace(self, settings=settings)

    def export(
        self,
        output: str | Output,
        *,
        portable: bool = False,
        cache: VariantStore | None = None,
        pool: Pool | None = None,
        report: Report | None = None,
    ) -> Exported:
        """Makes the layers and writes the image where an output line says, ``type=image,name=...,push=true`` for example.

        Layers that the image began with stay as they are, unless the line has force-compression=true.

        output:    BuildKit's ``--output`` line, or an Output made of one
        portable:  the same bytes on every CPU, as for ``estargz.build``
        cache:     finds finished layers, and keeps them; None: nothing is kept but what the line says
        pool:      threads and memory for all layers; None: a new one, for this compression and level
        report:    is told how far each layer is

        Raises UsageError, SourceError, BlobError, RegistryError, SinkError, and what a layer's own source raises.
        """
        from estargz.image.export import export
        from estargz.image.output import Output

        parsed = output if isinstance(output, Output) else Output.parse(output)
        return export(self, parsed, portable=portable, cache=cache, pool=pool, report=report)

    def close(self) -> None:
        """Frees what the base is read from. Images made of this one cannot be exported any more."""
        if self._source is not None:
            self._source.close()
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _registries(given: Registries | None) -> tuple[Registries, Registries | None]:
    """Those that are given, or new ones, which are then the image's own."""
    if given is not None:
        return given, None
    from estargz.registry.client import Registries

    own = Registries()
    return own, own


def _port(text: str) -> str:
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(/tcp|/udp|/sctp)?", text)
    if match is None or not 0 < int(match[1]) <= int(match[2] or match[1]) <= 65535:
        raise UsageError(f"{text!r} is no port: write 80, 80/udp or 8000-8010/tcp")
    return text if match[3] else f"{text}/tcp"


def _words(given: Sequence[str], name: str) -> list[str]:
    if isinstance(given, str):
        raise UsageError(f"{name} is a sequence of words, not one text; write [{given!r}]")
    return list(given)


def _environment(there: Any, more: Mapping[str, str]) -> list[str]:
    """Variables as NAME=VALUE; a name keeps its place."""
    known = [str(pair).partition("=") for pair in there or []]
    for name in more:
        if not name or "=" in name or "\0" in name:
            raise UsageError(f"{name!r} is no name of an environment variable")
    merged = {name: value for name, _, value in known} | dict(more)
    return [f"{name}={value}" for name, value in merged.items()]

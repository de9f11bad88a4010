"""The Python interface: the same engine that the server uses, behind a context manager."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tetriserve.config import EngineConfig, LoraConfig, PoolConfig, SchedulingConfig
from tetriserve.config import ModelConfig as ModelConfig
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Lora as Lora
from tetriserve.engine.intake import Generation
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.pictures import InputPicture
from tetriserve.engine.progress import GeneratedImage
from tetriserve.launch import StartProgress, launch
from tetriserve.workload.outcome import Outcome

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_T = TypeVar("_T")


class Picture:
    """A finished image: `image` for Pillow, `outcome` for what happened on the way (attained, degrees, times)."""

    def __init__(self, image: Image, outcome: Outcome) -> None:
        self.image = image
        self.outcome = outcome


class Engine:
    """A pool of workers with a scheduler, in this process.

    ```
    with Engine(ranks=2) as engine:
        picture = engine.generate("a red circle", size="512x512", slo_s=5)
        picture.image.save("circle.png")
    ```

    `model` is a diffusers checkpoint directory, None the bundled small model. `loras` are paths of safetensors files by
    the names that `generate(..., lora=NAME)` takes. Instead, `models` are several that share the pool, each with a name
    that `generate(..., model=NAME)` takes:

    ```
    models = (ModelConfig(name="photos", path="models/flux"), ModelConfig(name="drawings", ranks=(0,)))
    with Engine(models=models, ranks=2) as engine:
        engine.generate("a red circle", model="drawings")
    ```

    Worker processes import the program's main module, so a script must create its engine under
    `if __name__ == "__main__":`.

    Raises:
        ConfigError: model, degrees or policy cannot be served.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        ranks: int = 2,
        encoder_ranks: int | None = None,
        degrees: tuple[int, ...] = (),
        max_batch: int = 8,
        policy: str = "lookahead",
        device: str = "cpu",
        profile: str | None = None,
        adapter: str | None = None,
        loras: Mapping[str, str] | None = None,
        models: Sequence[ModelConfig] = (),
    ) -> None:
        one = ModelConfig(
            path=model,
            profile=profile,
            adapter=adapter,
            loras=tuple(LoraConfig(name, str(path)) for name, path in (loras or {}).items()),
        )
        if models and one != ModelConfig():
            raise ConfigError("models stands beside model, profile, adapter or loras; say these of each of models")
        self._config = EngineConfig(
            models=tuple(models) or (one,),
            pool=PoolConfig(
                num_ranks=ranks, encoder_ranks=encoder_ranks, degrees=degrees, max_batch=max_batch, device=device
            ),
            scheduling=SchedulingConfig(policy=policy),
        )
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._live: LiveEngine | None = None

    def __enter__(self) -> Self:
        self._loop, self._leaving = asyncio.new_event_loop(), asyncio.Event()
        arguments = (self._loop, self._leaving)
        self._thread = threading.Thread(target=_run_loop, args=arguments, name="tetriserve-engine", daemon=True)
        self._thread.start()
        try:
            self._live = self._call(launch(self._config, StartProgress())).engine
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._live is not None
        try:
            self._call(self._live.stop())
        finally:
            self._end_loop()
            self._live = None

    async def __aenter__(self) -> Self:
        entering = asyncio.ensure_future(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:
            await asyncio.wait({entering})  # a thread cannot be cancelled, and nobody else would exit this engine
            if entering.exception() is None:
                await self.__aexit__(None, None, None)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    def generate(self, prompt: str, *, images: Sequence[Image | np.ndarray] = (), **options: Any) -> Picture:
        """One image; blocks until it is there. Call it from several threads for several images at once.

        `options` are the fields of `Generation`: size, seed, num_steps, guidance_scale, negative_prompt,
        true_cfg_scale, max_sequence_length, degrees, lora (a name, or `Lora(name, scale)`), slo_s (deadline in seconds
        from now), priority, reject_infeasible, strength, model (a name). `images` come with the prompt: of Pillow, or
        arrays of uint8 (height, width, 3).

        Raises:
            InvalidRequest, QueueFull, DeadlineInfeasible: not admitted.
            RequestFailed: admitted, but it ended without an image.
        """
        return _picture(self._submit(Generation(prompt=prompt, images=_pictures(images), **options)).result())

    async def generate_async(
        self, prompt: str, *, images: Sequence[Image | np.ndarray] = (), **options: Any
    ) -> Picture:
        """As `generate`, for any event loop. Cancelling the call cancels the request."""
        pictures = await asyncio.to_thread(_pictures, images) if images else ()
        generated = await asyncio.wrap_future(self._submit(Generation(prompt=prompt, images=pictures, **options)))
        return await asyncio.to_thread(_picture, generated)

    def _submit(self, generation: Generation) -> Future[GeneratedImage]:
        with self._lock:  # what is handed to the loop before it is told to end is answered, nothing after
            loop = self._running_loop  # asked for first: a coroutine that never runs would be complained about
            return asyncio.run_coroutine_threadsafe(self._generate(generation), loop)

    async def _generate(self, generation: Generation) -> GeneratedImage:
        assert self._live is not None
        return await self._live.generate(generation)

    @property
    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("the engine is not running; use it inside `with Engine(...) as engine:`")
        return self._loop

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop).result()

    def _end_loop(self) -> None:
        with self._lock:
            loop, thread = self._loop, self._thread
            assert loop is not None and thread is not None
            self._loop = self._thread = None
            loop.call_soon_threadsafe(self._leaving.set)
        thread.join()


def _pictures(images: Sequence[Image | np.ndarray]) -> tuple[InputPicture, ...]:
    from PIL.Image import Image

    return tuple(
        InputPicture.of_image(image) if isinstance(image, Image) else InputPicture.of(image) for image in images
    )


def _picture(generated: GeneratedImage) -> Picture:
    """It copies the pixels: call it off any event loop."""
    from PIL import Image

    return Picture(Image.fromarray(generated.pixels), generated.outcome)


def _run_loop(loop: asyncio.AbstractEventLoop, leaving: asyncio.Event) -> None:
    """Run until told to leave; then cancel what is left (a start that was interrupted, say), see it end, and close."""
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(_wait(leaving))


async def _wait(event: asyncio.Event) -> None:
    await event.wait()

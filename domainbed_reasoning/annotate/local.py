"""A teacher in this process: any model that `mllm` loads, or the model to be trained itself (bootstrap)."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from domainbed_reasoning.annotate.pricing import Budget
from domainbed_reasoning.annotate.teacher import Answer, Request, TeacherError
from domainbed_reasoning.images.decode import read_rgb

# Requests that have waited this long run as a smaller batch.
_GATHER_SECONDS = 0.05


class LocalTeacher:
    """Answers in batches with `mllm.load_mllm`.

    Sampling is seeded per batch, so a run is reproducible as long as the batches are the same.

    Args:
        model: ``tiny``, a folder or a hub id.
        batch: images generated at a time.
        kind: ``hf`` for a teacher, ``self`` for the model to be trained.
        quantize: see `mllm.load_mllm`.
        trust_remote_code: see `mllm.load_mllm`.

    Raises:
        TeacherError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        batch: int = 16,
        kind: str = "hf",
        quantize: str = "none",
        trust_remote_code: bool = False,
    ):
        from domainbed_reasoning.mllm import ModelError, load_mllm

        try:
            self._mllm = load_mllm(model, quantize=quantize, trust_remote_code=trust_remote_code)
        except ModelError as error:
            raise TeacherError(str(error)) from error
        self._mllm.eval()
        self.name = f"{kind}:{model}"
        self.endpoint = ""
        # Two batches: the next one's images are read while this one is generated.
        self.concurrency = 2 * batch
        self.retried = 0
        self._batch = batch
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._thread = ThreadPoolExecutor(1)
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def answer(self, request: Request, budget: Budget) -> Answer:
        """Return the model's answer; see `Teacher.answer`."""
        async with budget.attempt() as made:
            answer = await self._answer(request)
            made.prompt_tokens, made.completion_tokens = answer.prompt_tokens, answer.completion_tokens
        return answer

    async def _answer(self, request: Request) -> Answer:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((request, future))
        if len(self._waiting) >= self._batch:
            self._start()
        elif self._timer is None:
            self._timer = loop.call_later(_GATHER_SECONDS, self._start)
        return await future

    async def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            batch, self._waiting = self._waiting, []
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: list[tuple[Request, asyncio.Future[Answer]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self._generate, [request for request, _ in batch])
        except Exception as error:  # a failure of the model, such as out of memory, ends the run
            for _, future in batch:
                if not future.done():
                    future.set_exception(TeacherError(f"{self.name} failed: {type(error).__name__}: {error}"))
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def _generate(self, requests: list[Request]) -> list[Answer]:
        import torch

        began = time.monotonic()
        first = requests[0]
        images = torch.stack([self._pixels(request.image) for request in requests])
        torch.manual_seed(first.seed)
        with torch.no_grad():
            texts = self._mllm.generate(
                images, first.question, first.max_tokens, temperature=first.temperature, top_p=first.top_p
            )
        prompt_tokens = self._mllm.prompt(first.question)["input_ids"].shape[1]
        seconds = (time.monotonic() - began) / len(requests)
        return [self._to_answer(text, first.max_tokens, prompt_tokens, seconds) for text in texts]

    def _to_answer(self, text: str, max_tokens: int, prompt_tokens: int, seconds: float) -> Answer:
        count = len(self._mllm.tokenizer(text, add_special_tokens=False)["input_ids"])
        finish = "length" if count >= max_tokens else "stop"
        return Answer(text, finish, False, prompt_tokens, count, seconds, self.name.partition(":")[2])

    def _pixels(self, image: bytes) -> Any:
        """Return an image as bytes, ``(3, H, W)``, at the model's size."""
        from domainbed_reasoning.mllm.pixels import from_picture

        return from_picture(self._mllm.image_size)(read_rgb(image))

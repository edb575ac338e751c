"""One thread that owns the model, and takes together what waits.

Embeddings: as many texts of one instruction as a call of `GritLM.encode` has
room for, of one request or of several. Chats: up to `max_batch` of those that
wait begin side by side, each with its own settings; while they are answered, a
second batch may begin. Texts and chats are padded to few shapes, so that there
is an end of the programs that requests have compiled. The thread goes from
burst to burst, and while texts and chats both wait for it, each kind gets half
of its time.
"""

import asyncio
import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from grit_jax.inference.generation import (
  BURST,
  Generation,
  Prompt,
)
from grit_jax.inference.gritlm import GritLM
from grit_jax.serve.requests import RequestError

# Batches of chats at one time: when one has begun, what comes next does not
# wait for its end.
GENERATIONS = 2
# A batch of chats has 1 row, so many times more, and so on up to `max_batch`.
ROWS_FACTOR = 4
# Seconds that one kind may have had more than the other while both wait.
LEAD_SECONDS = 1.0
# Seconds that `close` waits for the call that runs.
CLOSE_SECONDS = 10


def list_rows(max_batch: int) -> list[int]:
  """Returns the rows that batches of chats have, the most at the end."""
  rows = [1]
  while rows[-1] < max_batch:
    rows.append(min(rows[-1] * ROWS_FACTOR, max_batch))
  return rows


class Job:
  """What a request waits for; made and read in the event loop.

  Attributes:
    over: Whether it has got all, or nobody waits any more.
  """

  def __init__(self) -> None:
    """Keeps the loop that runs."""
    self.over = False
    self._loop = asyncio.get_running_loop()
    self._events: asyncio.Queue = asyncio.Queue()

  async def get(self) -> Any:
    """Returns the next thing that the thread put, or raises it."""
    event = await self._events.get()
    if isinstance(event, Exception):
      raise event
    return event

  def put(self, event: object) -> None:
    """Hands something over, from the thread."""
    try:
      self._loop.call_soon_threadsafe(self._events.put_nowait, event)
    except RuntimeError:
      # The loop has ended, and its requests with it.
      self.over = True


class EmbeddingJob(Job):
  """Texts; gets float32 [texts, D], in their order."""

  def __init__(
    self, texts: Sequence[str], instruction: str, lengths: Sequence[int]
  ):
    """Keeps the texts, with the tokens of each."""
    super().__init__()
    self.texts, self.instruction, self.lengths = texts, instruction, lengths
    self.begun = 0
    self._parts: list[np.ndarray] = []

  def take(self, tokens: int) -> tuple[list[str], int]:
    """Returns the next texts of up to so many tokens, and their tokens."""
    ends = list(itertools.accumulate(self.lengths[self.begun :]))
    count = sum(end <= tokens for end in ends)
    if not count:
      return [], 0
    texts = list(self.texts[self.begun : self.begun + count])
    self.begun += count
    return texts, ends[count - 1]

  def add(self, embeddings: np.ndarray) -> None:
    """Takes the next embeddings."""
    self._parts.append(embeddings)
    if sum(map(len, self._parts)) == len(self.texts):
      self.put(np.concatenate(self._parts))


class ChatJob(Job):
  """A conversation; gets pieces of its answer, if it streams, and the whole."""

  def __init__(self, prompt: Prompt, stream: bool):
    """Keeps the prompt."""
    super().__init__()
    self.prompt, self.stream = prompt, stream


class Batcher:
  """Runs jobs on the model, in a thread of its own."""

  def __init__(
    self,
    model: GritLM,
    max_batch: int,
    max_queue: int,
    max_input_tokens: int,
    places: int,
  ):
    """Starts the thread.

    Args:
      model: The model, which nobody else uses meanwhile.
      max_batch: Chats side by side, and texts of `max_input_tokens` a call.
      max_queue: Jobs that wait to begin.
      max_input_tokens: The most tokens of a text.
      places: Of the cache of a chat, enough for all.
    """
    self._model, self._max_batch = model, max_batch
    self._places, self._rows = places, list_rows(max_batch)
    self._max_queue, self._max_input_tokens = max_queue, max_input_tokens
    self._embeddings: collections.deque[EmbeddingJob] = collections.deque()
    self._chats: collections.deque[ChatJob] = collections.deque()
    self._running: list[tuple[Generation, list[ChatJob]]] = []
    self._changed = threading.Condition()
    self._closed = False
    # Seconds that texts have had more than chats.
    self._lead = 0.0
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  @property
  def alive(self) -> bool:
    """Whether the thread runs."""
    return self._thread.is_alive()

  def _queue_of(self, job: EmbeddingJob | ChatJob) -> collections.deque:
    return self._chats if isinstance(job, ChatJob) else self._embeddings

  def submit(self, job: EmbeddingJob | ChatJob) -> None:
    """Queues a job.

    Raises:
      RequestError: Too many wait, or the server stops.
    """
    waiting = self._queue_of(job)
    with self._changed:
      if self._closed:
        raise RequestError(503, 'The server is stopping.')
      if len(self._embeddings) + len(self._chats) >= self._max_queue:
        raise RequestError(
          429,
          f'{self._max_queue} requests are waiting already; try again later.',
          code='rate_limit_exceeded',
          headers={'Retry-After': '1'},
        )
      waiting.append(job)
      self._changed.notify()

  def drop(self, job: EmbeddingJob | ChatJob) -> None:
    """Forgets a job that nobody waits for, or that is done."""
    job.over = True
    waiting = self._queue_of(job)
    with self._changed:
      if job in waiting:
        waiting.remove(job)

  def close(self) -> None:
    """Ends the thread after the call that runs; what waits gets an error."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join(CLOSE_SECONDS)

  def _run(self) -> None:
    try:
      with jax.set_mesh(self._model.mesh):
        self._work()
    finally:
      # Nobody waits for what does not come, should there be a mistake in here.
      with self._changed:
        self._closed = True
        jobs = [*self._embeddings, *self._chats]
      for _, members in self._running:
        jobs += members
      for job in jobs:
        job.put(RequestError(503, 'The server is stopping.'))

  def _work(self) -> None:
    """Goes from burst to burst until the batcher is closed."""
    while True:
      with self._changed:
        while not (self._has_work() or self._closed):
          self._changed.wait()
        if self._closed:
          return
        texts = bool(self._embeddings)
        chats = bool(self._running or self._chats)
      # Time that one kind did not want gives it no claim.
      if not chats:
        self._lead = min(self._lead, 0.0)
      if not texts:
        self._lead = max(self._lead, 0.0)
      start = time.monotonic()
      if texts and (not chats or self._lead <= 0):
        self._encode()
        lead = self._lead + time.monotonic() - start
      else:
        self._generate()
        lead = self._lead - (time.monotonic() - start)
      self._lead = min(max(lead, -LEAD_SECONDS), LEAD_SECONDS)

  def _has_work(self) -> bool:
    return bool(self._embeddings or self._chats or self._running)

  def _encode(self) -> None:
    """Embeds the next texts of one instruction, as many as a call holds."""
    room = self._max_batch * self._max_input_tokens
    members, texts = [], []
    with self._changed:
      if not self._embeddings:
        return
      instruction = self._embeddings[0].instruction
      for job in list(self._embeddings):
        if job.instruction != instruction:
          continue
        taken, tokens = job.take(room)
        if taken:
          members.append((job, len(taken)))
          texts += taken
          room -= tokens
        if job.begun < len(job.texts):
          break
        self._embeddings.remove(job)
    with self._fail([job for job, _ in members]):
      found = self._model.encode(
        texts,
        instruction,
        max_length=self._max_input_tokens,
        batch_size=self._max_batch,
        show_progress_bar=False,
        few_shapes=True,
      )
      start = 0
      for job, count in members:
        job.add(found[start : start + count])
        start += count

  def _generate(self) -> None:
    """Begins a batch if there is one to begin, and goes on with all."""
    with self._changed:
      chats: list[ChatJob] = []
      if len(self._running) < GENERATIONS:
        while self._chats and len(chats) < self._max_batch:
          chats.append(self._chats.popleft())
    if chats:
      with self._fail(chats):
        prompts = [job.prompt for job in chats]
        generation = Generation(
          self._model.model,
          self._model.tokenizer,
          prompts,
          next(rows for rows in self._rows if rows >= len(chats)),
          self._places,
        )
        self._running.append((generation, chats))
        self._hand_over(generation, chats)
    for generation, jobs in list(self._running):
      with self._fail(jobs):
        self._step(generation, jobs)
        self._hand_over(generation, jobs)

  def _step(self, generation: Generation, jobs: Sequence[ChatJob]) -> None:
    """Generates a burst for those that wait, a token if one of them streams."""
    for row, job in enumerate(jobs):
      if job.over:
        generation.drop(row)
    if not generation.done:
      streams = any(job.stream and not job.over for job in jobs)
      generation.step(1 if streams else BURST)

  def _hand_over(self, generation: Generation, jobs: Sequence[ChatJob]) -> None:
    """Gives each job what is new of its answer."""
    for row, job in enumerate(jobs):
      if job.over:
        continue
      if job.stream and (piece := generation.texts[row].take_new()):
        job.put(piece)
      if generation.has_ended(row):
        job.put(generation.complete(row))
        job.over = True
    if generation.done:
      self._forget(jobs)

  def _forget(self, jobs: Sequence[Job]) -> None:
    self._running = [r for r in self._running if r[1] is not jobs]

  @contextlib.contextmanager
  def _fail(self, jobs: Sequence[EmbeddingJob | ChatJob]) -> Iterator[None]:
    """Has an error end these jobs, and no others."""
    try:
      yield
    except Exception as error:  # Of the device, say: the thread goes on.
      logging.exception('%d requests failed', len(jobs))
      self._forget(jobs)
      for job in jobs:
        job.put(RequestError(500, f'{type(error).__name__} on the server.'))
        self.drop(job)

"""Loads the server with clients of both kinds, and checks what each gets.

  pip install -e '.[serve]' openai
  python benchmarks/serve.py --model=runs/quickstart --output=serve.json

starts `python -m grit_jax.serve` in a process of its own and lets `--clients`
of OpenAI's clients ask at once: embeddings of one to four texts, with and
without an instruction, answers that are greedy or drawn, whole or streamed. One
request in ten cannot be answered, and one in twenty-five is a stream that its
client leaves. Every embedding and every answer is compared with what `GritLM`
gives for the same before, in a process that has ended when the server starts.
It prints latencies a kind, and the server's memory at intervals; it fails if an
answer is missing or wrong. Reads the memory in /proc: Linux alone.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import openai
from absl import app, flags, logging

from grit_jax import GritLM

_MODEL = flags.DEFINE_string('model', None, 'As of `grit_jax.serve`.')
_CLIENTS = flags.DEFINE_integer('clients', 64, 'That ask at one time.')
_REQUESTS = flags.DEFINE_integer('requests', 2000, 'Of all clients.')
_TOKENS = flags.DEFINE_integer('max_new_tokens', 16, 'Of an answer.')
_WORDS = flags.DEFINE_integer('max_words', 60, 'Of a text or a message.')
_BATCH = flags.DEFINE_integer('max_batch', 16, 'As of `grit_jax.serve`.')
_OUTPUT = flags.DEFINE_string('output', '', 'A JSON file for the figures.')

NAME = 'model'
INSTRUCTION = 'Given a question, retrieve what answers it'
TEXTS, CHATS = 40, 20
SAMPLES = 20  # of the server's memory
# float32, in calls of other shapes; embeddings have length 1.
TOLERANCE = 1e-5


@dataclasses.dataclass
class Expected:
  """What the server has to give.

  Attributes:
    texts: Texts of many lengths.
    embeddings: Of the texts, [texts, D], by instruction.
    messages: Conversations.
    answers: Of the conversations, by the temperature.
  """

  texts: list[str]
  embeddings: dict[str, np.ndarray]
  messages: list[list[dict[str, str]]]
  answers: dict[float, list[str]]


def answer_directly(path: str, tokens: int, most: int) -> Expected:
  """Draws texts and conversations, and asks the model about them."""
  rng = np.random.default_rng(0)
  words = (
    pathlib.Path(json.__file__).with_name('decoder.py').read_text().split()
  )

  def draw(number: int) -> str:
    count = int(most ** rng.random())
    start = rng.integers(len(words) - count)
    return f'{number} ' + ' '.join(words[start : start + count])

  texts = [draw(i) for i in range(TEXTS)]
  messages = [[{'role': 'user', 'content': draw(i)}] for i in range(CHATS)]
  model = GritLM.load(path, dtype='float32')
  return Expected(
    texts,
    {x: model.encode(texts, x) for x in ('', INSTRUCTION)},
    messages,
    {
      # The seed of a conversation is its number.
      x: model.generate(messages, max_new_tokens=tokens, temperature=x)
      for x in (0.0, 1.0)
    },
  )


class Load:
  """Requests, one after the other, and what came of them."""

  def __init__(self, expected: Expected, address: str, process: int):
    """Sends nothing yet."""
    self.expected, self.address, self.process = expected, address, process
    self.seconds: dict[str, list[float]] = collections.defaultdict(list)
    self.wrong: list[str] = []
    self.memory: list[tuple[int, float]] = []
    self._numbers = itertools.count()
    self._done = 0
    self._lock = threading.Lock()

  def run(self, requests: int) -> None:
    """Sends requests until there are so many, as one client."""
    client = openai.OpenAI(base_url=self.address, api_key='none')
    while (number := next(self._numbers)) < requests:
      start = time.perf_counter()
      try:
        kind, right = self.ask(client, number)
      except openai.OpenAIError as error:
        kind, right = f'{type(error).__name__}: {error}', False
      with self._lock:
        self.seconds[kind].append(time.perf_counter() - start)
        if not right:
          self.wrong.append(f'request {number}, {kind}')
        self._done += 1
        if self._done % max(1, requests // SAMPLES) == 0:
          self.memory.append((self._done, read_mib(self.process)))

  def ask(self, client: openai.OpenAI, number: int) -> tuple[str, bool]:
    """Sends one request; returns its kind, and whether the answer is right."""
    rng = np.random.default_rng(number)
    if number % 10 == 9:
      try:
        client.embeddings.create(model=NAME, input=[], dimensions=1)
      except openai.BadRequestError as error:
        return 'refused', error.body['param'] == 'input'
      return 'refused', False
    if number % 2:
      texts = rng.choice(TEXTS, rng.integers(1, 5))
      instruction = ('', INSTRUCTION)[rng.integers(2)]
      found = client.embeddings.create(
        model=NAME,
        input=[self.expected.texts[i] for i in texts],
        extra_body={'instruction': instruction},
      )
      wanted = self.expected.embeddings[instruction][texts]
      got = np.array([item.embedding for item in found.data])
      return 'embeddings', bool(np.abs(got - wanted).max() < TOLERANCE)
    chat, stream = int(rng.integers(CHATS)), bool(rng.integers(2))
    temperature = float(rng.integers(2))
    found = client.chat.completions.create(
      model=NAME,
      messages=self.expected.messages[chat],
      temperature=temperature,
      seed=chat,
      max_tokens=_TOKENS.value,
      stream=stream or number % 25 == 0,
    )
    wanted = self.expected.answers[temperature][chat]
    if number % 25 == 0:
      with found:
        next(found)
      return 'left', True
    if not stream:
      return 'chat', found.choices[0].message.content == wanted
    text = ''.join(piece.choices[0].delta.content or '' for piece in found)
    return 'stream', text == wanted


def read_mib(process: int) -> float:
  """Returns what a process has in memory."""
  status = pathlib.Path(f'/proc/{process}/status').read_text()
  return int(re.search(r'VmRSS:\s+(\d+) kB', status)[1]) / 1024


def start_server(log: pathlib.Path) -> tuple[subprocess.Popen, str]:
  """Starts the server, and returns it and its address once it listens."""
  with log.open('w') as file:
    process = subprocess.Popen(
      [
        sys.executable, '-m', 'grit_jax.serve', f'--model={_MODEL.value}',
        f'--name={NAME}', '--port=0', '--dtype=float32',
        f'--max_batch={_BATCH.value}',
      ],
      stderr=file,
    )  # fmt: skip
  while process.poll() is None:
    if found := re.search(r'Serving at (\S+)', log.read_text()):
      return process, found[1]
    time.sleep(0.1)
  sys.exit(f'The server has ended:\n{log.read_text()}')


def summarize(load: Load, seconds: float) -> dict:
  """Returns the figures."""
  kinds = {}
  for kind, times in sorted(load.seconds.items()):
    middle, late, last = np.quantile(times, [0.5, 0.95, 1.0])
    kinds[kind] = {
      'requests': len(times),
      'p50_seconds': middle,
      'p95_seconds': late,
      'max_seconds': last,
    }
  done = sum(map(len, load.seconds.values()))
  return {
    'clients': _CLIENTS.value,
    'requests': done,
    'wrong': load.wrong,
    'requests_per_second': done / seconds,
    'kinds': kinds,
    'memory_mib': load.memory,
  }


def describe(figures: dict) -> str:
  """Returns the figures as tables."""
  lines = [
    f'{figures["requests"]} requests of {figures["clients"]} clients, '
    f'{len(figures["wrong"])} wrong, '
    f'{figures["requests_per_second"]:.1f} a second',
    '',
    '| kind | requests | p50 s | p95 s | max s |',
    '|---|---|---|---|---|',
  ]
  for kind, row in figures['kinds'].items():
    lines.append(
      f'| {kind} | {row["requests"]} | {row["p50_seconds"]:.2f} | '
      f'{row["p95_seconds"]:.2f} | {row["max_seconds"]:.2f} |'
    )
  lines += ['', '| after requests | MiB |', '|---|---|']
  lines += [f'| {done} | {mib:.0f} |' for done, mib in figures['memory_mib']]
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  """Runs the load and prints what came of it."""
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  # The client logs each request.
  logging.set_verbosity(logging.WARNING)
  with concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context('spawn')
  ) as pool:
    expected = pool.submit(
      answer_directly, _MODEL.value, _TOKENS.value, _WORDS.value
    ).result()
  with tempfile.TemporaryDirectory() as folder:
    process, address = start_server(pathlib.Path(folder) / 'log')
    try:
      load = Load(expected, address, process.pid)
      start = time.perf_counter()
      with concurrent.futures.ThreadPoolExecutor(_CLIENTS.value) as pool:
        for client in [
          pool.submit(load.run, _REQUESTS.value) for _ in range(_CLIENTS.value)
        ]:
          client.result()
      figures = summarize(load, time.perf_counter() - start)
    finally:
      process.send_signal(signal.SIGTERM)
      process.wait()
  print(describe(figures))
  if _OUTPUT.value:
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(figures, indent=2))
  if figures['wrong']:
    sys.exit('\n'.join(figures['wrong'][:20]))


if __name__ == '__main__':
  flags.mark_flag_as_required('model')
  app.run(main)

"""The paper's table of latencies, side by side with PyTorch's.

Two samples: a question of one token with a document of thousands, and the
inverse; 16 new tokens, never fewer. What is timed is what a user waits for:
the question is embedded, the index is searched, and the answer generated. A
document's cache is made before, and not timed (arXiv 2402.09906, table 5).

The two sides run turn by turn, each mode on one and then on the other, so that
what else the machine does slows both alike; the median of the turns is shown.
"""

import argparse
import copy
import dataclasses
import importlib.util
import os
import pathlib
import platform
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from grit_jax.config import Config, ModelConfig
from grit_jax.convert import keys
from grit_jax.convert.hf_config import CONFIG_FILE
from grit_jax.convert.streamed import StreamedArray, write_checkpoint
from grit_jax.convert.to_hf import to_hf
from grit_jax.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.errors import UserError
from grit_jax.files import check_writable, write_json
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.index import Index
from grit_jax.inference.sampling import Sampling
from grit_jax.initial import open_initial
from grit_jax.rag.answering import Answerer, encode_documents
from grit_jax.rag.caches import HostCaches
from grit_jax.rag.prompts import Mode

NEW_TOKENS = 16
# One token.
SHORT = 'the'
# 255 million weights in the layers and 66 in the tables of tokens.
MODEL = ModelConfig(
  vocab_size=32000,
  embed_dim=1024,
  num_layers=16,
  num_heads=16,
  num_kv_heads=4,
  head_dim=64,
  mlp_dim=3584,
  max_positions=8192,
  dtype='float32',
)


@dataclasses.dataclass(frozen=True)
class Sample:
  """What is asked, and the one document of the index.

  Attributes:
    question: The question.
    document: The document.
    tokens: Of the question, and of the document.
  """

  question: str
  document: dict[str, str]
  tokens: tuple[int, int]


# Answers in a mode, and returns the tokens generated.
Run = Callable[[Mode], Sequence[int]]


def write_model(
  folder: pathlib.Path, model: ModelConfig, tokenizer: bytes
) -> pathlib.Path:
  """Writes a model of random weights as a Hugging Face folder.

  Args:
    folder: Where.
    model: What is written.
    tokenizer: A sentencepiece model of its vocabulary.

  Returns:
    The folder of the model, in it.
  """

  def draw(seed: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
    if 'norm' in path:
      return np.ones(shape, np.float32)
    rng = np.random.default_rng(seed)
    return 0.02 * rng.standard_normal(shape, np.float32)

  def stream(seed: int, path: str, shape: tuple[int, ...]) -> Callable:
    return lambda: iter([((), draw(seed, path, shape))])

  write_checkpoint(
    folder / 'checkpoint',
    {
      path: StreamedArray(shape, np.dtype(np.float32), stream(i, path, shape))
      for i, (path, shape) in enumerate(keys.weight_shapes(model).items())
    },
    dataclasses.asdict(Config(model=model)),
    {SENTENCEPIECE_FILE: tokenizer},
  )
  to_hf(folder / 'checkpoint', folder / 'model')
  shutil.rmtree(folder / 'checkpoint')
  return folder / 'model'


def _train_tokenizer() -> bytes:
  texts = [path.read_text(errors='replace') for path in _find_library()]
  return train_tokenizer(texts, MODEL.vocab_size)


def _find_library() -> list[pathlib.Path]:
  """Returns the modules of the standard library, for text to cut."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  return sorted(root.glob('*.py')) + sorted(root.glob('[a-z]*/[a-z]*.py'))


def make_samples(tokenizer: Tokenizer, length: int) -> list[Sample]:
  """Returns the two samples: a long document, and a long question."""
  source = ''.join(
    path.read_text(errors='replace') for path in _find_library()[:40]
  )
  long = source[: _find_end(tokenizer, source, length)]
  short, many = (len(tokenizer.encode(text)) for text in (SHORT, long))
  return [
    Sample(SHORT, {'id': 'long', 'text': long}, (short, many)),
    Sample(long, {'id': 'short', 'text': SHORT}, (many, short)),
  ]


def _find_end(tokenizer: Tokenizer, text: str, length: int) -> int:
  """Returns where a text ends that has `length` tokens, or few less."""
  low, high = 1, min(len(text), 40 * length)
  while low < high:
    middle = (low + high + 1) // 2
    if len(tokenizer.encode(text[:middle])) <= length:
      low = middle
    else:
      high = middle - 1
  return low


def make_ours(model: GritLM, sample: Sample, folder: pathlib.Path) -> Run:
  """Prepares our side: an index of the document, and its caches."""
  documents, positions = [sample.document], model.config.model.max_positions
  embeddings, (first,) = encode_documents(model, documents, Mode.DOC, positions)
  _, (behind,) = encode_documents(model, documents, Mode.QUERY_DOC, positions)
  index = Index.create(folder, embeddings.shape[1])
  index.extend(embeddings, documents)
  # Nothing ends a text before its 16 tokens.
  tokenizer = copy.copy(model.tokenizer)
  tokenizer.eos = -1
  endless = GritLM(model.config, model.model, tokenizer, model.mesh)
  dtype, size = model.config.model.dtype, first.nbytes + behind.nbytes

  def make(mode: Mode) -> Answerer:
    cache = behind if mode is Mode.QUERY_DOC else first
    caches = HostCaches(lambda number: cache, dtype, size)
    return Answerer(endless, index, mode, caches)

  answerers = {mode: make(mode) for mode in Mode}

  def run(mode: Mode) -> Sequence[int]:
    (answer,) = answerers[mode].answer([sample.question], Sampling(NEW_TOKENS))
    return answer.completion.ids

  return run


def measure(
  sides: dict[str, Run], repeats: int, advance: Callable[[], Any]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, bool]]:
  """Times each mode on each side, turn by turn.

  Args:
    sides: By name.
    repeats: Turns that count.
    advance: Called after each run.

  Returns:
    Seconds by mode and side, one a turn; and by mode whether all sides gave
    the same tokens.

  Raises:
    RuntimeError: A side gave not 16 tokens.
  """
  seconds: dict[str, dict[str, list[float]]] = {}
  equal = {}
  for mode in Mode:
    seconds[mode.value] = {name: [] for name in sides}
    found = {}
    # The first turn compiles, and does not count.
    for turn in range(repeats + 1):
      for name, run in sides.items():
        start = time.perf_counter()
        tokens = run(mode)
        took = time.perf_counter() - start
        if len(tokens) != NEW_TOKENS:
          raise RuntimeError(
            f'{name}: {len(tokens)} tokens in {mode.value}, not {NEW_TOKENS}'
          )
        found[name] = tuple(map(int, tokens))
        if turn:
          seconds[mode.value][name].append(took)
        advance()
    equal[mode.value] = len(set(found.values())) == 1
  return seconds, equal


def run_benchmark(flags: argparse.Namespace) -> None:
  """Measures both samples; prints the table, and writes it as JSON.

  Args:
    flags: Of `python -m grit_jax.rag benchmark`.
  """
  check_writable(flags.output)
  if flags.model and not (pathlib.Path(flags.model) / CONFIG_FILE).is_file():
    raise UserError(
      f'{flags.model}: not a Hugging Face folder, with {CONFIG_FILE}.'
    )
  with tempfile.TemporaryDirectory(prefix='rag') as name:
    place = pathlib.Path(name)
    folder = flags.model or write_model(place, MODEL, _train_tokenizer())
    tokenizer = open_initial(folder).tokenizer
    samples = make_samples(tokenizer, flags.tokens)
    model = GritLM.load(folder, dtype=flags.dtype)
    theirs = None
    if all(map(importlib.util.find_spec, ('torch', 'gritlm'))):
      from grit_jax.rag.torch_side import TorchSide

      theirs = TorchSide(folder, model.config.model.attention, flags.dtype)
    else:
      logging.warning('torch and gritlm are not installed: ours runs alone.')
    rows = []
    sides = 1 + (theirs is not None)
    total = len(samples) * len(Mode) * sides * (flags.repeats + 1)
    with tqdm(total=total, desc='Measuring', unit=' answers') as bar:
      for number, sample in enumerate(samples):
        pair = {'grit_jax': make_ours(model, sample, place / f'index{number}')}
        if theirs:
          pair['pytorch'] = theirs.prepare(sample.question, sample.document)
        seconds, equal = measure(pair, flags.repeats, bar.update)
        rows.append(
          {
            'query_tokens': sample.tokens[0],
            'document_tokens': sample.tokens[1],
            'seconds': seconds,
            'same_tokens': equal,
          }
        )
  report = {
    'new_tokens': NEW_TOKENS,
    'model': str(flags.model) or 'random weights',
    'dtype': flags.dtype,
    'repeats': flags.repeats,
    'machine': _describe_machine(model, theirs),
    'samples': rows,
    'gains': _gains(rows),
  }
  print(to_table(report))
  write_json(flags.output, report)


def _describe_machine(model: GritLM, theirs: Any) -> dict[str, Any]:
  devices = [device.device_kind for device in model.mesh.devices.flat]
  machine = {
    'devices': devices,
    'cores': len(os.sched_getaffinity(0)),
    'load': os.getloadavg()[1],
    'python': platform.python_version(),
    'jax': jax.__version__,
  }
  return machine | (theirs.versions if theirs else {})


def _gains(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
  """Returns the share of time that caching saves where it should."""
  gains = {}
  for name, sample, cached, uncached in (
    ('doc caching, long document', 0, Mode.DOC, Mode.DOCUMENT_FIRST),
    ('query caching, long query', 1, Mode.QUERY, Mode.QUERY_FIRST),
  ):
    seconds = rows[sample]['seconds']
    gains[name] = {
      side: 1
      - statistics.median(times)
      / statistics.median(seconds[uncached.value][side])
      for side, times in seconds[cached.value].items()
    }
  return gains


def to_table(report: dict[str, Any]) -> str:
  """Returns the medians as a table in Markdown."""
  sides = list(report['samples'][0]['seconds'][Mode.NO_RETRIEVAL.value])
  head = ['seconds']
  for sample in report['samples']:
    name = f'{sample["query_tokens"]} + {sample["document_tokens"]} tokens'
    head += [f'{name}, {side}' for side in sides]
    head += ['ratio'] if len(sides) > 1 else []
  lines = [head, ['---', *(['---:'] * (len(head) - 1))]]
  for mode in Mode:
    line = [mode.value]
    for sample in report['samples']:
      medians = [
        statistics.median(times)
        for times in sample['seconds'][mode.value].values()
      ]
      line += [f'{value:.2f}' for value in medians]
      if len(sides) > 1:
        line.append(f'{medians[1] / medians[0]:.2f}')
    lines.append(line)
  table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  gains = [
    f'{name}: '
    + ', '.join(f'{side} {gain:.0%} less' for side, gain in by.items())
    for name, by in report['gains'].items()
  ]
  return '\n'.join([table, '', *gains])

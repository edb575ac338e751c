"""Measures the data path, from text on the disk to rows for the devices.

  pip install -e . mistral-common
  python benchmarks/data.py --records=100000 --folder=/tmp/data_benchmark

writes a corpus whose texts are as long as those of the paper's mixture: six
data sets of pairs and one of conversations, RECORDS in all. It prepares it with
the command of `grit_jax.data.prepare`, and then builds the steps of the recipe
(2048 pairs with a hard negative each, 256 conversations, rows of 2048 tokens)
as one of `--hosts` hosts would. Tokens a second are a second of one core's
time: what the processes took of all cores, from the system's own counts.

The folder is kept: another run with it measures the steps alone, and prepares
nothing. Remove it to measure all.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

from grit_jax.config import Config, DataConfig, EvaluationConfig
from grit_jax.data import records
from grit_jax.data.filling import RowShards
from grit_jax.data.pipeline import Pipeline
from grit_jax.data.preparation import prepare_data
from grit_jax.data.sources import TRAIN, sources
from grit_jax.data.tokenizer import load_tokenizer

_RECORDS = flags.DEFINE_integer('records', 100_000, 'Records of the corpus.')
_FOLDER = flags.DEFINE_string('folder', None, 'Where everything is kept.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', "A sentencepiece model; empty: Mistral's, of mistral-common."
)
_STEPS = flags.DEFINE_integer('steps', 100, 'Steps that are built.')
_HOSTS = flags.DEFINE_integer('hosts', 1, 'Hosts that share the rows.')
_SHARDS = flags.DEFINE_integer('shards', 64, 'Shards of rows: chips.')
_OUTPUT = flags.DEFINE_string('output', '', 'A JSON file for the figures.')

# Share of the records and mean tokens of a passage; the paper's mixture has
# such sets (MS MARCO, Natural Questions, NLI, question answering, synthetic
# queries, documents).
PAIRS = {
  'passages': (0.20, 80),
  'questions': (0.16, 134),
  'sentences': (0.16, 22),
  'answers': (0.12, 221),
  'synthetic': (0.08, 490),
  'documents': (0.08, 860),
}
CONVERSATIONS, CONVERSATION_TOKENS = 0.20, 560
# Of the lognormal lengths; and what a word of the corpus takes.
SPREAD, TOKENS_A_WORD = 0.6, 1.45


def write_corpus(folder: pathlib.Path, count: int) -> int:
  """Writes the corpus, and returns its bytes."""
  rng = np.random.default_rng(0)
  text = pathlib.Path(json.__file__).with_name('decoder.py').read_text()
  vocabulary = np.array(sorted(set(text.split()), key=len)[:2000])
  # A long stretch of words, of which texts are slices: drawing each word of
  # each text would take longer than all that is measured.
  stretch = rng.choice(vocabulary, 200_000)

  def write(tokens: float) -> str:
    words = max(1, int(tokens / TOKENS_A_WORD))
    start = rng.integers(len(stretch) - words)
    return ' '.join(stretch[start : start + words])

  def draw(mean: float) -> float:
    # Of this median, the mean of the lognormal is `mean`.
    median = mean / np.exp(SPREAD**2 / 2)
    return min(median * np.exp(SPREAD * rng.standard_normal()), 4000)

  folder.mkdir(parents=True)
  for name, (share, mean) in PAIRS.items():
    with open(folder / f'{name}.jsonl', 'w') as file:
      for i in range(int(count * share)):
        record = {
          'query': ['Find the text that answers', write(rng.integers(12, 40))],
          'pos': [['', f'{i} {write(draw(mean))}']],
          'neg': [['', write(draw(mean))] for _ in range(2)],
        }
        file.write(json.dumps(record) + '\n')
  with open(folder / 'conversations.jsonl', 'w') as file:
    for _ in range(int(count * CONVERSATIONS)):
      tokens = draw(CONVERSATION_TOKENS) / 4
      turns = [write(tokens * part) for part in (0.5, 1.5, 0.5, 1.5)]
      file.write(json.dumps({'text': turns}) + '\n')
  return sum(path.stat().st_size for path in folder.iterdir())


def measure_preparation(
  folder: pathlib.Path, tokenizer: str
) -> dict[str, float]:
  """Runs the command on the corpus."""
  start = time.perf_counter()
  subprocess.run(
    [
      sys.executable, '-m', 'grit_jax.data.prepare',
      f'--source={folder / "raw"}', f'--target={folder / "prepared"}',
      f'--tokenizer={tokenizer}', '--held_out_fraction=0',
    ],
    check=True,
  )  # fmt: skip
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return {
    'preparation_seconds': time.perf_counter() - start,
    'preparation_core_seconds': used.ru_utime + used.ru_stime,
    # Of the largest of its processes.
    'preparation_peak_mib': used.ru_maxrss / 1024,
  }


def measure_steps(
  folder: pathlib.Path, tokenizer_path: str
) -> dict[str, float]:
  """Plans a run on the prepared corpus and builds its first steps."""
  config = Config(
    data=DataConfig(
      paths=str(folder / 'prepared'), tokenizer=tokenizer_path, row_buckets=8
    ),
    evaluation=EvaluationConfig(held_out_fraction=0.0),
    steps=1253,
  )
  config = fit_batch(config, _RECORDS.value)
  tokenizer = load_tokenizer(tokenizer_path)
  found = sources(config.data.paths)
  sets = prepare_data(config, folder, found, tokenizer, TRAIN)
  before = current_mib()
  shards = RowShards(_SHARDS.value, tuple(range(_SHARDS.value // _HOSTS.value)))
  start = time.process_time()
  pipeline = Pipeline(
    config, sets[records.EMBEDDING], sets[records.GENERATIVE], shards
  )
  planning = time.process_time() - start
  useful, packed, computed = np.zeros((3, 2))
  iterator = pipeline.iterate()
  start, wall = time.process_time(), time.perf_counter()
  for _ in range(_STEPS.value):
    batch = next(iterator).batch
    rows = [
      len(batch.embedding.rows.tokens),
      len(batch.generative.loss_weights),
    ]
    computed += np.array(rows) * _HOSTS.value * config.data.row_length
  seconds, wall = time.process_time() - start, time.perf_counter() - wall
  # Apart from what is timed: a run plans a step once when it builds it.
  for step in range(_STEPS.value):
    plans = (
      pipeline.plan.embedding_step(step),
      pipeline.plan.generative_step(step),
    )
    useful += [plan.lengths.sum() for plan in plans]
    rows = [plan.packing.num_rows for plan in plans]
    packed += np.array(rows) * config.data.row_length
  return {
    'tokens': int(
      sum(one.lengths.sum() for kind in sets.values() for one in kind)
    ),
    'planning_core_seconds': planning,
    'built_tokens_per_core_second': useful.sum() / _HOSTS.value / seconds,
    'built_tokens_per_second': useful.sum() / _HOSTS.value / wall,
    # Of the rows that hold texts, and of all that a step computes: a device has
    # as many rows as any other, so a step is padded to a multiple of shards.
    'useful_of_packed_embedding': useful[0] / packed[0],
    'useful_of_packed_generative': useful[1] / packed[1],
    'useful_of_computed': useful.sum() / computed.sum(),
    'mib_before_planning': before,
    'mib_after_steps': current_mib(),
  }


def fit_batch(config: Config, count: int) -> Config:
  """Returns the recipe's batch, or the largest that a small corpus fills."""
  smallest = min(share for share, _ in PAIRS.values())
  pairs = min(2048, 1 << int(np.log2(count * smallest)))
  talks = min(256, 8 * int(count * CONVERSATIONS / 8))
  data = dataclasses.replace(
    config.data, embedding_batch=pairs, generative_batch=talks
  )
  return dataclasses.replace(config, data=data)


def current_mib() -> float:
  """Returns what this process holds now, without what it maps from files."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('RssAnon'):
      return int(line.split()[1]) / 1024
  raise OSError('/proc/self/status has no RssAnon: this needs Linux.')


def main(argv: list[str]) -> None:
  """Measures, and prints the figures."""
  del argv
  folder = pathlib.Path(_FOLDER.value)
  tokenizer = _TOKENIZER.value
  if not tokenizer:
    import mistral_common

    data = pathlib.Path(mistral_common.__file__).parent / 'data'
    tokenizer = os.fspath(data / 'tokenizer.model.v1')
  figures: dict[str, float] = {'records': _RECORDS.value}
  if not (folder / 'prepared').exists():
    figures['raw_mib'] = write_corpus(folder / 'raw', _RECORDS.value) / 2**20
    figures |= measure_preparation(folder, tokenizer)
  figures |= measure_steps(folder, tokenizer)
  if 'preparation_core_seconds' in figures:
    figures['prepared_tokens_per_core_second'] = (
      figures['tokens'] / figures['preparation_core_seconds']
    )
  for key, value in figures.items():
    print(
      f'{key}: {value:,.3f}'
      if isinstance(value, float)
      else f'{key}: {value:,}'
    )
  if _OUTPUT.value:
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(figures, indent=2))


if __name__ == '__main__':
  flags.mark_flags_as_required(['folder'])
  app.run(main)

"""Encoding against the PyTorch package: useful tokens a second, side by side.

Both embed the same texts with the same weights on this machine, in turns; the
embeddings are compared. The PyTorch package runs with several batch sizes, and
its best one counts:

  python benchmarks/encode.py [--model=FOLDER] [--texts=2000] [--output=FILE]

Without a Hugging Face folder, `--layers` and `--width` make a Mistral of random
weights with Mistral's tokenizer. Lengths are a mixture as in GRIT's data: short
questions and sentences, passages, and documents that are cut. A useful token is
one of a text, its format included; padding is none. Needs the extra `test`.
"""

import argparse
import itertools
import json
import os
import pathlib
import sysconfig
import tempfile
import time
from collections.abc import Callable

import jax
import mistral_common
import numpy as np
import torch
from gritlm import GritLM as PyTorchGritLM

from grit_jax import GritLM
from grit_jax.config import ModelConfig
from grit_jax.data.standard_library import library_files
from grit_jax.rag.benchmark import write_model

MAX_LENGTH = 512
PREFIX = '<|embed|>\n'
# Share of the texts, and their mean length in tokens.
MIXTURE = (
  (0.25, 80),
  (0.2, 134),
  (0.2, 22),
  (0.15, 221),
  (0.1, 490),
  (0.1, 860),
)
# Sums of the same float32 products in another order, over vectors of length 1.
TOLERANCE = 1e-5
BATCH_SIZES = (32, 256)


def main() -> None:
  """Encodes in turns, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', type=pathlib.Path)
  parser.add_argument('--texts', type=int, default=2000)
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--output', type=pathlib.Path)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    folder = flags.model or write_random(
      pathlib.Path(scratch), flags.layers, flags.width
    )
    results = race(folder, flags.texts, flags.rounds)
  print(f'{"":24}{"useful tokens/s":>16}{"seconds":>10}')
  for name, row in results['runs'].items():
    print(f'{name:24}{row["tokens_per_second"]:16,.0f}{row["seconds"]:10.1f}')
  print(
    f'{results["useful_tokens"]:,} useful tokens in {flags.texts} texts; '
    f'{results["ratio"]:.2f} times the best of PyTorch; '
    f'largest difference {results["difference"]:.1e}'
  )
  if flags.output:
    flags.output.write_text(json.dumps(results, indent=2) + '\n')
  assert results['difference'] < TOLERANCE


def write_random(
  scratch: pathlib.Path, layers: int, width: int
) -> pathlib.Path:
  """Writes a Hugging Face folder of random float32 weights."""
  model = ModelConfig(
    vocab_size=32000, embed_dim=width, num_layers=layers, num_heads=width // 64,
    num_kv_heads=max(1, width // 256), head_dim=64, mlp_dim=width * 7 // 2,
    dtype='float32',
  )  # fmt: skip
  tokenizer = (
    pathlib.Path(mistral_common.__file__).parent / 'data/tokenizer.model.v1'
  )
  return write_model(scratch, model, tokenizer.read_bytes())


def draw_texts(count: int) -> list[str]:
  """Cuts texts of the mixture's lengths out of the standard library."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  words = [
    word
    for _, path in itertools.islice(library_files(root), 300)
    for word in path.read_text(errors='replace').split()
    if word.isascii()
  ]
  rng = np.random.default_rng(0)
  shares, means = zip(*MIXTURE, strict=True)
  texts = []
  for kind in rng.choice(len(MIXTURE), count, p=shares):
    # A word of source text is about three tokens.
    length = max(1, int(rng.gamma(2.0, means[kind] / 2.0) / 3))
    start = rng.integers(len(words) - length)
    texts.append(' '.join(words[start : start + length]))
  return texts


def race(folder: pathlib.Path, count: int, rounds: int) -> dict:
  """Encodes with both, in turns; the first texts of each are a warm-up."""
  torch.set_num_threads(os.cpu_count())
  ours = GritLM.load(folder, dtype='float32')
  theirs = PyTorchGritLM(
    str(folder), mode='embedding', torch_dtype=torch.float32
  )
  texts = draw_texts(count)
  prefix = ours.tokenizer.bos_piece + PREFIX
  useful = sum(
    min(len(ours.tokenizer.encode(prefix + text)), MAX_LENGTH) for text in texts
  )
  runs: dict[str, Callable] = {'grit_jax': lambda t: ours.encode(t)}
  for size in BATCH_SIZES:
    runs[f'PyTorch, batch_size={size}'] = lambda t, size=size: theirs.encode(
      t, batch_size=size, instruction=PREFIX, max_length=MAX_LENGTH
    )
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  found = {}
  # All shapes are compiled once: that is not of every call.
  ours.encode(texts)
  theirs.encode(texts[:64], instruction=PREFIX)
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      found[name] = run(texts)
      seconds[name].append(time.perf_counter() - start)
  best = {name: min(times) for name, times in seconds.items()}
  others = [name for name in runs if name != 'grit_jax']
  return {
    'device': jax.devices()[0].device_kind,
    'useful_tokens': useful,
    'ratio': min(best[name] for name in others) / best['grit_jax'],
    'difference': max(
      float(np.abs(found[name] - found['grit_jax']).max()) for name in others
    ),
    'runs': {
      name: {'seconds': best[name], 'tokens_per_second': useful / best[name]}
      for name in runs
    },
  }


if __name__ == '__main__':
  main()

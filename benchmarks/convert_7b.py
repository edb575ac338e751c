"""Converts a folder of Mistral 7B's size both ways: time, memory, equality.

Writes a folder of random bfloat16 weights (14.5 GB, in two files, as the
published one has them), converts it into a checkpoint and back, each in a
process of its own, and compares the two folders tensor by tensor, bit by bit:

  python benchmarks/convert_7b.py --folder=FOLDER [--layers=32] [--output=FILE]

Needs 45 GB at `--folder` for all layers, and leaves nothing there.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
from safetensors import safe_open

from grit_jax.convert import hf_config, keys
from grit_jax.convert.safetensors_writer import StreamedTensor, write_tensors
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.models import presets

# Runs a command, and writes what it took: seconds, and kilobytes at the most.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[2:], check=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], 'w') as file:
  json.dump([time.perf_counter() - start, usage.ru_maxrss], file)
"""


def main() -> None:
  """Makes the folder, converts it both ways, compares and reports."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', required=True, type=pathlib.Path)
  parser.add_argument('--layers', type=int, default=32)
  parser.add_argument('--output', type=pathlib.Path)
  flags = parser.parse_args()
  flags.folder.mkdir(parents=True)
  try:
    results = run(flags.folder, flags.layers)
  finally:
    shutil.rmtree(flags.folder)
  print(f'{"":10}{"seconds":>10}{"GB/s":>10}{"peak GB":>10}')
  for name in 'from_hf', 'to_hf':
    row = results[name]
    print(
      f'{name:10}{row["seconds"]:10.1f}{row["gb_per_second"]:10.3f}'
      f'{row["peak_gb"]:10.2f}'
    )
  print(f'{results["gigabytes"]:.2f} GB; bitwise equal: {results["equal"]}')
  if flags.output:
    flags.output.write_text(json.dumps(results, indent=2) + '\n')
  if not results['equal']:
    sys.exit('The folders differ.')


def run(folder: pathlib.Path, layers: int) -> dict:
  """Does all of it below `folder`."""
  source, checkpoint, target = (
    folder / name for name in ('hf', 'checkpoint', 'hf_again')
  )
  size = write_folder(source, layers)
  results: dict = {'layers': layers, 'gigabytes': size / 1e9}
  for name, origin, end in (
    ('from_hf', source, checkpoint),
    ('to_hf', checkpoint, target),
  ):
    seconds, peak = measure(folder, name, origin, end)
    results[name] = {
      'seconds': seconds,
      'gb_per_second': size / 1e9 / seconds,
      'peak_gb': peak * 1024 / 1e9,
    }
  results['equal'] = are_equal(source, target)
  return results


def write_folder(folder: pathlib.Path, layers: int) -> int:
  """Writes random weights of Mistral 7B's shapes; returns their bytes."""
  folder.mkdir()
  model = presets.mistral_7b()
  config = hf_config.from_model(model, 'bfloat16', bos=1, eos=2)
  config['num_hidden_layers'] = layers
  (folder / 'config.json').write_text(json.dumps(config))
  text = pathlib.Path(__file__).read_text()
  (folder / 'tokenizer.model').write_bytes(train_tokenizer([text], 400))
  rng = np.random.default_rng(0)
  dtype = np.dtype(ml_dtypes.bfloat16)
  table = keys.tensors(hf_config.to_model(config, 'config.json'))
  streamed = {
    tensor.name: StreamedTensor(
      tensor.shape, dtype, lambda shape=tensor.shape: draw(rng, shape)
    )
    for tensor in table
  }
  write_tensors(folder, streamed, 10**10)
  return sum(tensor.size for tensor in streamed.values())


def draw(rng: np.random.Generator, shape: tuple[int, ...]):
  """Yields stretches of rows, normal with deviation 0.02, as weights are."""
  for start in range(0, shape[0], 1024):
    rows = min(1024, shape[0] - start)
    values = rng.standard_normal((rows, *shape[1:]), np.float32)
    yield (values * np.float32(0.02)).astype(ml_dtypes.bfloat16)


def measure(
  folder: pathlib.Path, command: str, source: pathlib.Path, target: pathlib.Path
) -> tuple[float, int]:
  """Returns seconds and peak kilobytes of the command in its own process."""
  report = folder / 'usage.json'
  subprocess.run(
    [
      sys.executable, '-c', MEASURE, report, sys.executable, '-m',
      'grit_jax.convert', command, f'--source={source}', f'--target={target}',
    ],
    check=True,
  )  # fmt: skip
  return tuple(json.loads(report.read_text()))


def are_equal(first: pathlib.Path, second: pathlib.Path) -> bool:
  """Whether two folders have the same tensors, bit by bit."""
  places = [locate(folder) for folder in (first, second)]
  if places[0].keys() != places[1].keys():
    return False
  for name in places[0]:
    values = []
    for place in places:
      with safe_open(place[name], 'np') as file:
        values.append(file.get_tensor(name).view(np.uint16))
    if not np.array_equal(*values):
      return False
  return True


def locate(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns which file of a folder has which tensor."""
  places = {}
  for path in folder.glob('*.safetensors'):
    with safe_open(path, 'np') as file:
      places |= dict.fromkeys(file.keys(), path)
  return places


if __name__ == '__main__':
  main()

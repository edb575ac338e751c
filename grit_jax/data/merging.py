"""From the parts of a source to its tokenized data set.

The folder of a data set holds

- `records/`: the tokens, a TFDS data set with the splits of the source;
- `{split}-{name}.npy`: the index of a split, mapped into memory, all that
  planning batches needs;
- `dataset.json`: what it was made of, and what was read, cut and dropped.

Shards are moved, not copied, and index files are joined a part at a time.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import (
  dataset_info,
  file_adapters,
  naming,
)
from tensorflow_datasets.core import (
  splits as tfds_splits,
)

from grit_jax.data import parts as parts_of
from grit_jax.data import records
from grit_jax.data.examples import (
  FORMAT_VERSION,
  EmbeddingEncoder,
  GenerativeEncoder,
)
from grit_jax.data.parts import SPLITS
from grit_jax.data.reports import Report
from grit_jax.files import write_json

NAME = 'tokens'
FORMAT = file_adapters.FileFormat.ARRAY_RECORD
# Of TFDS: the names of the shards' files.
SHARD_TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
# Ids that are compared at once; more are compared in several passes.
_IDS_AT_ONCE = 1 << 20


def merge(
  parts: list[pathlib.Path], folder: pathlib.Path, kind: str, content: dict
) -> None:
  """Makes a data set of parts; they lose their shards.

  A merge that was interrupted goes on when it is called again.

  Args:
    parts: The folders of the parts, in order.
    folder: The data set's folder, not yet under its final name.
    kind: Of the records.
    content: Of `dataset.json`, without its splits.
  """
  records_folder = folder / 'records'
  records_folder.mkdir(parents=True, exist_ok=True)
  read = [parts_of.read_part(part) for part in parts]
  splits = {}
  for split in SPLITS:
    splits[split] = _sum_up([part['splits'][split] for part in read])
    splits[split]['place'] = content['places'][split]
    filled = [
      (folder, part['splits'][split])
      for folder, part in zip(parts, read, strict=True)
      if part['splits'][split]['report']['records']
    ]
    if filled:
      _join_index([part for part, _ in filled], folder, split)
  _write_info(read, records_folder, kind)
  content = {name: content[name] for name in content if name != 'places'}
  write_json(folder / 'dataset.json', {**content, 'splits': splits})
  _move_shards(parts, read, records_folder)


def _sum_up(contents: list[dict[str, Any]]) -> dict[str, Any]:
  report = Report()
  fewest = None
  for content in contents:
    report.add(Report(**content['report']))
    found = content.get('fewest_negatives')
    if found and (fewest is None or found[0] < fewest[0]):
      fewest = found
  return {'report': dataclasses.asdict(report), 'fewest_negatives': fewest}


def _join_index(
  parts: list[pathlib.Path], folder: pathlib.Path, split: str
) -> None:
  for first in sorted(parts[0].glob(f'{split}-*.npy')):
    arrays = [np.load(part / first.name, mmap_mode='r') for part in parts]
    starts = first.name == f'{split}-offsets.npy'
    with (folder / first.name).open('wb') as file:
      _write_joined(file, arrays, starts)


def _write_joined(
  file: BinaryIO, arrays: list[np.ndarray], starts: bool
) -> None:
  """Writes arrays as one; with `starts`, each goes on from the last number."""
  length = sum(len(array) for array in arrays)
  if starts:
    length -= len(arrays) - 1
  header = {
    'descr': np.lib.format.dtype_to_descr(arrays[0].dtype),
    'fortran_order': False,
    'shape': (length,),
  }
  np.lib.format.write_array_header_1_0(file, header)
  last = 0
  for number, array in enumerate(arrays):
    values = np.asarray(array)
    if starts:
      values = values[1 if number else 0 :] + last
      last = int(values[-1])
    file.write(values.tobytes())


def make_features(kind: str) -> tfds.features.FeaturesDict:
  """Returns TFDS's features of the records of a kind."""
  encoder = EmbeddingEncoder if kind == records.EMBEDDING else GenerativeEncoder
  return tfds.features.FeaturesDict(encoder.features)


def _write_info(
  read: list[dict[str, Any]], folder: pathlib.Path, kind: str
) -> None:
  identity = dataset_info.DatasetIdentity(
    name=NAME,
    version=tfds.core.Version(f'{FORMAT_VERSION}.0.0'),
    data_dir=os.fspath(folder),
    module_name=__name__,
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    features=make_features(kind),
    disable_shuffling=True,
  )
  info.set_file_format(FORMAT)
  found = []
  for split in SPLITS:
    shards = [part['splits'][split] for part in read]
    lengths = [shard['report']['records'] for shard in shards]
    lengths = [length for length in lengths if length]
    if lengths:
      found.append(
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=lengths,
          num_bytes=sum(shard['bytes'] for shard in shards),
          filename_template=_template(folder, split),
        )
      )
  info.set_splits(tfds_splits.SplitDict(found))
  info.write_to_directory(folder)


def _template(folder: pathlib.Path, split: str) -> naming.ShardedFileTemplate:
  return naming.ShardedFileTemplate(
    dataset_name=NAME,
    data_dir=folder,
    split=split,
    filetype_suffix=FORMAT.file_suffix,
  )


def _move_shards(
  parts: list[pathlib.Path], read: list[dict[str, Any]], folder: pathlib.Path
) -> None:
  for split in SPLITS:
    filled = [
      part / f'{split}.array_record'
      for part, content in zip(parts, read, strict=True)
      if content['splits'][split]['report']['records']
    ]
    template = _template(folder, split)
    for number, shard in enumerate(filled):
      target = template.sharded_filepath(
        shard_index=number, num_shards=len(filled)
      )
      # It may have been moved before a kill.
      if shard.exists():
        shard.rename(os.fspath(target))


def find_duplicates(
  parts: list[pathlib.Path],
) -> Iterator[tuple[int, tuple[str, int], tuple[str, int]]]:
  """Finds records that have the id of an earlier one.

  Ids are compared by 64 bits of their hashes.

  Args:
    parts: The folders of the parts, in order.

  Yields:
    The part of the later record, its split and number, and those of the first
    record with its id; not in order.
  """
  arrays = [np.load(part / 'ids.npy', mmap_mode='r') for part in parts]
  total = sum(len(array) for array in arrays)
  passes = -(-total // _IDS_AT_ONCE)
  for number in range(passes):
    chosen = []
    for part, array in enumerate(arrays):
      # The upper half of a hash decides in which pass it is looked at.
      upper = array['hash'] >> np.uint64(32)
      ids = array[upper * np.uint64(passes) >> np.uint64(32) == number]
      chosen.append((np.full(len(ids), part), ids))
    part_of = np.concatenate([part for part, _ in chosen])
    ids = np.concatenate([ids for _, ids in chosen])
    order = np.argsort(ids['hash'], kind='stable')
    hashes = ids['hash'][order]
    is_first = np.concatenate([[True], hashes[1:] != hashes[:-1]])
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))
    for later in np.flatnonzero(~is_first):
      place, origin = order[later], order[first[later]]
      yield int(part_of[place]), _key(ids[place]), _key(ids[origin])


def _key(entry: np.void) -> tuple[str, int]:
  return SPLITS[entry['split']], int(entry['number'])

"""XLA's options for what runs a decoder: one table, a device kind a row."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# On these chips a grouped product is a convolution over all experts otherwise;
# v5p has the kernel by default.
_GROUPED_PRODUCT = {'xla_tpu_enable_ragged_dot_kernel': True}

# Gathers and reduce-scatters of weights run on the chip's sparse cores, beside
# the products; by default nothing else runs meanwhile.
_ON_SPARSE_CORES = {
  # What the tensor core would do by itself, fused with products.
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': False,
  'xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter': False,
  'xla_tpu_enable_sparse_core_collective_offload_all_gather': True,
  'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': True,
  # Gathers over two axes of a torus too: all of those of 8x8 chips and more.
  'xla_tpu_enable_sparse_core_collective_offload_2d_all_gather': True,
  # Arrays keep the layout of the tensor core: no copies between the two.
  'xla_tpu_use_tc_device_shape_on_sc': True,
  # Both as the three above need them.
  'xla_sc_enable_instruction_fusion': False,
  'xla_sc_disable_megacore_partitioning': True,
}

# A product of two matrices goes to Eigen: by default it goes to YNNPACK, which
# on x86 is 10 to 15 % slower over a layer, forward and backward. Sums stay
# there. Exponentials and the like run over whole AVX-512 registers, if the CPU
# has them.
_ON_CPU = {
  'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE',
  'xla_cpu_prefer_vector_width': 512,
}

# By `jax.Device.device_kind`. v5e overlaps gathers by default, and no option is
# known that makes v5p ('TPU v5') do so: many rows a chip hide them there.
OPTIONS: dict[str, dict[str, Any]] = {
  'TPU v4': _GROUPED_PRODUCT,
  'TPU v5 lite': _GROUPED_PRODUCT,
  'TPU v6 lite': _GROUPED_PRODUCT | _ON_SPARSE_CORES,
  'TPU7x': _GROUPED_PRODUCT,
  'cpu': _ON_CPU,
}


def compiler_options(device_kind: str) -> dict[str, Any]:
  """Returns the options for a device kind; none for one that needs none."""
  return OPTIONS.get(device_kind, {})


def jit(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
  """Returns `jax.jit` of a function, with the options of the mesh in force.

  A function that a module has for all meshes is compiled for each device kind
  with that kind's options; `of_kind` of the result gives them.

  Args:
    function: what to compile.
    **arguments: of `jax.jit`.
  """

  @functools.cache
  def compiled(kind: str) -> Callable[..., Any]:
    options = compiler_options(kind)
    return jax.jit(function, compiler_options=options, **arguments)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    kind = jax.sharding.get_mesh().devices.flat[0].device_kind
    return compiled(kind)(*args, **kwargs)

  with_kinds: Any = call
  with_kinds.of_kind = compiled
  return with_kinds

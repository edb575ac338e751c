"""XLA's options for the train step: one table, a chip a row."""

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

# By `jax.Device.device_kind`. v5e overlaps gathers by default, and no option is
# known that makes v5p ('TPU v5') do so: many rows a chip hide them there.
OPTIONS: dict[str, dict[str, bool]] = {
  'TPU v4': _GROUPED_PRODUCT,
  'TPU v5 lite': _GROUPED_PRODUCT,
  'TPU v6 lite': _GROUPED_PRODUCT | _ON_SPARSE_CORES,
  'TPU7x': _GROUPED_PRODUCT,
}


def compiler_options(device: jax.Device) -> dict[str, bool]:
  """Returns the options for a device; none for a kind that needs none."""
  return OPTIONS.get(device.device_kind, {})

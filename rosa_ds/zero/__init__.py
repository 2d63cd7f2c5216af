"""Everything that reads DeepSpeed's internals: no other folder imports ``deepspeed`` or names an attribute of it.

This file gives the parameters that are sharded over ranks, which adapters and models need; the engine and its master
weights are imported from their modules, since they import DeepSpeed, which is slow.
"""

from rosa_ds.zero.group import has_float16, initialize
from rosa_ds.zero.prefetch import GatherAhead
from rosa_ds.zero.sharded import (
    Fill,
    belongs_to_engine,
    comes_and_goes,
    divide,
    full_numel,
    full_shape,
    gather,
    held_numbers,
    is_partitioned,
    keep_numbers,
    own_numbers,
    own_share,
    partition_model,
    partition_of,
    read_to_owners,
    read_whole,
    whole_of,
    write_whole,
)

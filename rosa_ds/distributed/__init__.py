"""Everything that concerns more than one rank: no file outside this folder talks to ``torch.distributed``."""

from rosa_ds.distributed.group import (
    any_rank,
    barrier,
    broadcast,
    device,
    free_memory,
    gather_objects,
    gpu_has_bfloat16,
    is_main,
    leave,
    leave_hub_to_first_rank,
    main_first,
    on_leave,
    owners_by_cost,
    peak_memory_bytes,
    planned_local_rank,
    planned_local_size,
    planned_rank,
    planned_world_size,
    raise_everywhere,
    rank,
    same_everywhere,
    send,
    shutdown,
    sum_over_ranks,
    sum_to_owner,
    together,
    use_threads,
    world_size,
)
from rosa_ds.distributed.timing import backend, time_collectives
from rosa_ds.distributed.traffic import TrafficCounter
from rosa_ds.distributed.watch import (
    describe_ranks,
    leave_errors_to_watch,
    lost_contact,
    progress,
    start_watch,
    stop_watch,
)

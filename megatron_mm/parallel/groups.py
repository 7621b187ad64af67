"""Process groups of a rank, in one object."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm import platform
from megatron_mm.config import ParallelConfig
from megatron_mm.errors import LaunchError
from megatron_mm.parallel import descriptors


@dataclass(frozen=True)
class EncoderGroups:
    """Groups of an encoder that stands beside the pipeline (`vision_parallel` replica).

    Attributes:
        pg: as for the model, but every rank of the job with the same part of the encoder is one of
            its data-parallel ranks.
        owners: the ranks of a replica with the same part of the encoder, those of the first
            pipeline stage first: tiles are dealt to them.
    """

    pg: ProcessGroupCollection
    owners: dist.ProcessGroup


@dataclass(frozen=True)
class Groups:
    """megatron-core's process groups and two gloo groups on the CPU.

    Attributes:
        pg: megatron-core's collection, passed to every constructor.
        replica: gloo group of one data-parallel replica (tensor x context x pipeline ranks); its
            first rank reads the data for all of them.
        world: gloo group of all ranks, for collective decisions.
        encoder: of an encoder beside the pipeline; None if it is a part of the first stage.
    """

    pg: ProcessGroupCollection
    replica: dist.ProcessGroup
    world: dist.ProcessGroup
    encoder: EncoderGroups | None = None

    @property
    def is_reader(self) -> bool:
        """Whether this rank reads the data of its replica."""
        return self.replica.rank() == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the model's first stage, virtual stages included."""
        return self.pg.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the model's last stage, virtual stages included."""
        return self.pg.pp.rank() == self.pg.pp.size() - 1


def start(parallel: ParallelConfig) -> None:
    """Joins the job that torchrun started; without torchrun, starts a job of one rank.

    A collective that waits longer than `distributed_timeout_minutes` raises on every rank with
    gloo; with NCCL it ends the process.

    Raises:
        LaunchError: this rank cannot join: the port is taken, the address unknown, a variable of
            torchrun's wrong, or there is no GPU for it.
    """
    descriptors.raise_limit()
    # Otherwise every gloo group connects each of its ranks with all others at once.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    if torch.cuda.is_available():
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
    alone = os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ
    try:
        if not 0 <= int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):
            raise ValueError("RANK is not below WORLD_SIZE")
        dist.init_process_group(
            platform.backend(),
            timeout=datetime.timedelta(minutes=parallel.distributed_timeout_minutes),
            **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}),
        )
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise LaunchError(_why(error)) from None


def _take_gpu(number: int, count: int) -> None:
    if not 0 <= number < count:
        raise LaunchError(
            f"rank {os.environ['RANK']} is number {number} on {socket.gethostname()} (LOCAL_RANK, "
            f"from 0), where {count} GPUs are visible; start as many ranks as GPUs "
            "(--nproc-per-node, NPROC_PER_NODE), and show every rank all of the node's GPUs"
        )
    torch.cuda.set_device(number)


def _why(error: Exception) -> str:
    """Returns in one line why this rank cannot join the job."""
    rank, address, port, size = (
        os.environ.get(key, "none") for key in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    )
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return (
            f"rank {rank} cannot listen on MASTER_PORT {port}: another program has it; set another "
            "MASTER_PORT (torchrun: --master-port), or start with --standalone"
        )
    text = text if len(text) <= 160 else text[:157] + "..."
    return (
        f"rank {rank} of {size} cannot join the job at MASTER_ADDR {address}, MASTER_PORT {port}: "
        f"{text}; start all ranks with one address and a free port, or with torchrun"
    )


def lay_out(parallel: ParallelConfig) -> ProcessGroupCollection:
    """Makes megatron-core's groups over the running job (rank order: tp, cp, ep, dp, pp)."""
    with platform.groups_of_one_share():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            # Twins of data-parallel groups, for optimizer checkpoints of another format than ours.
            create_gloo_process_groups=False,
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        )
    return ProcessGroupCollection.use_mpu_process_groups()


def lay_out_encoder(parallel: ParallelConfig, pg: ProcessGroupCollection) -> EncoderGroups | None:
    """Makes the groups of the encoder, if it stands beside the pipeline. Every rank calls it."""
    if parallel.vision_parallel != "replica":
        return None
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    tp, cp, dp, pp = (group.size() for group in (pg.tp, pg.cp, pg.dp, pg.pp))
    # megatron-core's rank order, tp fastest: the number of a rank is its place in this block.
    ranks = torch.arange(dist.get_world_size()).view(pp, dp, cp, tp)
    parts = parallel.vision_tensor_parallel_size or tp
    data, owners, alone = None, None, pg.tp
    with platform.groups_of_one_share():
        for part in range(parts):
            # Ranks with this part: of the whole job, and of each replica.
            same = ranks[..., part::parts] if parts > 1 else ranks
            data = _joined(same.flatten().tolist(), timeout) or data
            for replica in range(dp):
                owners = _joined(same[:, replica].flatten().tolist(), timeout) or owners
        if parts == 1 < tp:
            alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    found = ProcessGroupCollection(
        tp=alone,
        mp=alone,
        dp=data,
        dp_cp=data,
        intra_dist_opt=pg.intra_dist_opt,
        # An encoder has no experts, and megatron-core asks for these groups all the same.
        **{name: getattr(pg, name) for name in ("pp", "ep", "expt_dp", "expt_tp", "tp_ep_pp")},
    )
    assert owners is not None  # every rank is one of a replica's
    return EncoderGroups(found, owners)


def _joined(ranks: list[int], timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """A new group of these ranks, if this one is among them. Every rank calls it."""
    group = dist.new_group(ranks, timeout=timeout)
    return group if dist.get_rank() in ranks else None


def build(parallel: ParallelConfig) -> Groups:
    """Makes all groups of this rank. Every rank of the running job calls it."""
    pg = lay_out(parallel)
    # gloo groups get the same timeout as the others.
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    turns: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(turns, pg.dp.rank())
    replica = None
    for turn in range(pg.dp.size()):
        ranks = [rank for rank, other in enumerate(turns) if other == turn]
        group = dist.new_group(ranks, timeout=timeout, backend="gloo")
        if dist.get_rank() in ranks:
            replica = group
    world = dist.new_group(timeout=timeout, backend="gloo")
    return Groups(pg, replica, world, lay_out_encoder(parallel, pg))


def stop() -> None:
    """Destroys all groups."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()

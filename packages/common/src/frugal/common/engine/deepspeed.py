"""The engine on DeepSpeed: ZeRO 0 to 3 and offload, from a file of ds_configs/."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.contracts import NormsOfWholeTensors, Objective, WholeTensors
from frugal.common.distributed import gather, place_in_world, sum_over_processes
from frugal.common.engine.engine import Engine, GradientPart, check_world_size, fresh_moments
from frugal.common.errors import InputError
from frugal.common.files import read_text, reason_of
from frugal.common.optim.optimizers import (
    leave_out_fused_kernels,
    set_learning_rate,
    skip_unless_finite,
)
from frugal.common.ports import free_port
from frugal.common.recipe import Recipe
from frugal.common.run import Run


class DeepSpeedEngine(Engine):
    """``deepspeed.initialize`` around the objective.

    Weights stay float32 and the objective computes under autocast, as with Accelerate, so that
    precision is the recipe's alone and the logit scale keeps all its digits at every stage.

    The host waits for the device once or twice a step from stage 1 on, in DeepSpeed's optimizers:
    they read there whether a gradient overflowed and whether its norm is finite (of offloaded
    gradients the norm of every parameter). Stage 0 reads nothing.
    """

    def __init__(self, objective: Objective, recipe: Recipe, run: Run) -> None:
        super().__init__(objective, run, recipe)
        assert recipe.engine.deepspeed_config is not None
        _announce_single_process()
        _leave_out_shared_memory_operator()
        backend = "nccl" if run.device.type == "cuda" else "gloo"
        # variables of MPI linger in shells; who is there is known already
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        check_world_size(place_in_world()[1], "DeepSpeed")
        objective.to(run.device)
        config = fill_config(recipe.engine.deepspeed_config, recipe, run.world_size)
        self._clip_norm = recipe.optimizer.clip_norm
        optimizer = recipe.optimizer.build(objective)
        moments = self._moments_of_groups(optimizer)
        self._engine, _, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )
        self._stage = self._engine.zero_optimization_stage()
        self.name = f"deepspeed zero{self._stage}"
        self._has_whole_gradients = self._stage == 0 or recipe.engine.virtual_processes is not None
        if isinstance(optimizer, NormsOfWholeTensors) and self._stage > 0:
            if self._has_whole_gradients:
                raise InputError(
                    f"engine.virtual_processes: {type(recipe.optimizer).__name__} adds norms up "
                    f"over the processes at ZeRO stage {self._stage}, in an order that depends on "
                    "their number; give a file of stage 0, or leave virtual processes out"
                )
            optimizer.total = self._sum_of_parts
        if isinstance(optimizer, WholeTensors) and self._stage > 0:
            optimizer.gather = self._gather
        if self._stage > 0 and self._has_whole_gradients:
            leave_out_fused_kernels(optimizer)
        self._create_moments(moments)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    @override
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        # the loop knows which pass is the last of a step: DeepSpeed need not count them
        self._engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    @override
    def backward(self, loss: Tensor) -> None:
        # a new tensor: DeepSpeed hooks what forward returns, and divides the gradient of that by
        # its own accumulation steps unless it has met the tensor given here before
        loss = loss.clone()
        if self._scale is not None:
            if self._stage == 0:
                loss = self.scaled(loss)
            else:
                # a number of the host, which DeepSpeed compares; it has waited for it already
                self._engine.optimizer.override_loss_scale(self._scale.scale.item())
        self._engine.backward(loss, scale_wrt_gas=False)

    @override
    def gradient_parts(self) -> Iterator[GradientPart]:
        if self._has_whole_gradients:
            yield from self._shared_gradients()
            return
        parameter: Any
        for number, (_, parameter) in enumerate(self.trainable()):
            if self._stage == 3:
                part = safe_get_local_grad(parameter)
                start = self.run.rank * part.numel()
                # what fills the last part up is no gradient
                part = part[: max(self.whole_shape(parameter).numel() - start, 0)]
                yield GradientPart(number, start, part)
            elif (held := parameter._hp_mapping) is not None:
                # DeepSpeed has a name for the whole gradient alone, which it gathers
                gradient = held.get_lp_grad_fragment(parameter._index_in_param_group)
                yield GradientPart(number, held.lp_fragment_address.start, gradient)

    @override
    def _step(self, learning_rate: float) -> Tensor:
        set_learning_rate(self._engine.optimizer, learning_rate)
        if not self._has_whole_gradients:
            return self._step_zero()
        norm = self._clip()
        if self._stage == 0:
            skip_unless_finite(self._engine.optimizer, norm)
            self._engine.step()
            return norm
        self._hand_in(norm)
        return norm.where(self._step_zero().isfinite(), torch.nan)

    def _clip(self) -> Tensor:
        """The norm of gradients that are whole on every process, which are clipped."""
        parameters = [p for _, p in self.trainable() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._scale is not None:
            torch._foreach_div_(gradients, self._scale.scale)
        norm = nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        return norm

    def _hand_in(self, norm: Tensor) -> None:
        """Stages 1 and 2: give every process its part of gradients that are whole, as they are.

        Where their norm (), is not finite, none of them is, so that DeepSpeed skips the step.
        """
        whole = [(parameter, parameter.grad) for _, parameter in self.trainable()]
        for parameter, _ in whole:
            parameter.grad = None
        # DeepSpeed makes room for gradients in a backward pass alone: here one of zeros
        with self.accumulating(last=True):
            self._engine.backward(
                torch.stack([(parameter * 0.0).sum() for parameter, _ in whole]).sum(),
                scale_wrt_gas=False,
            )
        for parameter, gradient in whole:
            if gradient is not None:
                safe_set_full_grad(parameter, gradient.where(norm.isfinite(), torch.nan))
        self._engine.optimizer.override_loss_scale(1.0)

    def _step_zero(self) -> Tensor:
        """Stages 1 to 3: DeepSpeed clips, and skips a step without finite norm everywhere."""
        self._engine.step()
        applied = self._engine.was_step_applied()
        norm = self._engine.get_global_grad_norm() if applied else torch.nan
        return torch.as_tensor(norm, dtype=torch.float32)

    def _state(self) -> dict[torch.Tensor, dict[str, Tensor]]:
        base = self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer
        return base.state

    @override
    def read(self, kind: str, parameter: nn.Parameter) -> Tensor:
        if self._stage == 3 and not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        elif kind == "weight":
            # below stage 3 the working copy is float32 and whole: it is the master copy
            whole = safe_get_full_fp32_param(parameter) if self._stage == 3 else parameter.detach()
        elif self._stage == 0:
            whole = self._state()[parameter][kind]
        else:
            whole = safe_get_full_optimizer_state(parameter, kind)
        return whole

    @override
    def write(self, kind: str, parameter: nn.Parameter, value: Tensor) -> None:
        value = value.to(self.run.device)
        if self._stage == 3:
            self._write_partition(kind, parameter, value)
        elif kind == "weight":
            with torch.no_grad():
                parameter.copy_(value)
            # the optimizer steps a flat copy of its own, and overwrites the parameter from that
            if self._stage > 0 and parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value)
        elif self._stage == 0:
            self._state()[parameter][kind].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _write_partition(self, kind: str, parameter: Any, value: Tensor) -> None:
        """Stage 3: this process's part, of the master copy and of the working copy.

        DeepSpeed's own setter for whole tensors fails on tensors that the processes do not
        divide, and leaves the working copy stale.
        """
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self.run.world_size, device=value.device)
        padded[: value.numel()] = value.flatten()
        part = padded[size * self.run.rank : size * (self.run.rank + 1)]
        if kind == "weight":
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.data.copy_(part)
            # small ones stay whole on every process behind a step that was taken, and are gathered
            # anew by the next one: until then the passes and evaluations would see what was before
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.data.copy_(value.reshape(parameter.ds_shape))
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    @override
    def whole_shape(self, parameter: Any) -> torch.Size:
        # stage 3 leaves an empty tensor in the place of each parameter
        return parameter.ds_shape if self._stage == 3 else parameter.shape

    @override
    def moments(self) -> Iterable[dict[str, Tensor]]:
        return self._state().values()

    def _sum_of_parts(self, squares: Tensor) -> Tensor:
        """Of numbers that each process found in its part of a tensor."""
        total = sum_over_processes(squares.to(self.run.device))  # offloaded ones work on the CPU
        return total.to(squares.device)

    def _gather(self, piece: Tensor) -> Tensor:
        """The pieces of all processes, in their order."""
        return gather(piece.to(self.run.device)).to(piece.device)

    def _create_moments(self, moments: Sequence[Sequence[str]]) -> None:
        """Make what each group of the optimizer keeps."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            for group, kinds in zip(optimizer.param_groups, moments, strict=True):
                for parameter in group["params"]:
                    self._state()[parameter] = fresh_moments(parameter, kinds)
            return
        if self._stage == 3:
            flat = optimizer.fp32_partitioned_groups_flat
            groups = [optimizer.sub_group_to_group_id[part] for part in range(len(flat))]
        else:
            flat = optimizer.single_partition_of_fp32_groups
            groups = list(range(len(flat)))
        for group, tensor in zip(groups, flat, strict=True):
            self._state()[tensor] = fresh_moments(tensor, moments[group])
        # parameters learn where their moments lie, which DeepSpeed does at the first step otherwise
        if self._stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    @override
    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        # gathering alone is not enough: hooks would give every module's weights back after its
        # forward pass, and processes with unequal numbers of passes wait for each other for ever
        with unwrap_model_for_generation(self._engine):
            yield

    @override
    def close(self) -> None:
        self._engine.destroy()
        super().close()


def _leave_out_shared_memory_operator() -> None:
    """Have DeepSpeed not build its shared-memory all-reduce for CPUs, which only inference calls.

    It would compile for half a minute at first use, and every process of every run would leave 66
    MiB in ``/dev/shm`` that nothing takes back: some hundred runs fill the machine's memory.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _announce_single_process() -> None:
    """Without a launcher, tell DeepSpeed of the one process there is."""
    if "RANK" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        return
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )


def read_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed file.

    Raises:
        InputError: if there is none, or it is not a JSON object.
    """
    try:
        text = read_text(path)
    except InputError as error:
        raise InputError(f"the DeepSpeed file {error}, or give one of ds_configs/") from None
    try:
        config = json.loads(text, object_pairs_hook=partial(_refuse_repeated_names, path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"the DeepSpeed file {path} is not JSON: {reason_of(error)}") from None
    if not isinstance(config, dict):
        raise InputError(f"the DeepSpeed file {path} must hold a JSON object")
    return config


def _refuse_repeated_names(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise InputError(f"the DeepSpeed file {path} has {repeated!r} twice; remove one of them")
    return content


_NO_TIMERS = {"throughput": {"enabled": False}}
"""DeepSpeed's throughput, which nobody prints, would cost two waits for the device per step."""


_WITHOUT_EFFECT = {
    "activation_checkpointing": "the recipe decides by engine.checkpoint_activations",
    "compile": "the recipe decides by engine.compile",
    "amp": "the recipe decides by engine.precision",
    "curriculum_learning": "has no effect here",
    "data_efficiency": "has no effect here",
    "data_sampling": "has no effect here",
    "progressive_layer_drop": "has no effect here",
    "elasticity": "would change the batch size, which the recipe decides",
    "autotuning": "has no effect here",
    "compression_training": "has no effect here",
    "quantize_training": "has no effect here",
}
"""Sections that DeepSpeed would read, or pass over, without a word."""
_DECIDED_BY_RECIPE = ("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "torch_autocast", "amp")
_KNOWN = (
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "gradient_clipping", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "communication_data_type", "data_types", "prescale_gradients",
    "gradient_predivide_factor", "disable_allgather", "disable_python_gc", "aio", "checkpoint",
    "nebula", "datastates_ckpt", "dataloader_drop_last", "steps_per_print", "dump_state",
    "log_level", "wall_clock_breakdown", "memory_breakdown", "timers", "comms_logger",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet",
)  # fmt: skip
"""What a file may set: memory, communication, and what DeepSpeed tells of itself. Every other name
is one that DeepSpeed passes over without a word, or that would train something else."""


def fill_config(path: Path, recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The DeepSpeed file with what the recipe decides filled in.

    The file decides memory and communication; batch, clipping and precision are the recipe's,
    and optimizer and schedule are ours. A value that stands in both must agree.

    Raises:
        InputError: if the file contradicts the recipe.
    """
    config = read_config(path)
    for section in _DECIDED_BY_RECIPE:
        given = config.pop(section, None)
        if given is None or (isinstance(given, dict) and given.get("enabled") is False):
            continue
        owner = "optimizer" if section == "optimizer" else "schedule"
        owner = owner if section in ("optimizer", "scheduler") else "engine.precision"
        raise InputError(
            f"the DeepSpeed file {path} has a section {section!r}, which the recipe decides by "
            f"{owner}; remove it from the file"
        )
    for name, reason in _WITHOUT_EFFECT.items():
        if config.get(name) not in (None, False, {}):
            raise InputError(
                f"the DeepSpeed file {path} has {name!r}, which {reason}; remove it from the file"
            )
    stage = _check_names(config, path)
    is_virtual = recipe.engine.virtual_processes is not None
    if is_virtual and stage:
        _check_whole(config, path, stage)
    backwards = backwards_per_step(recipe, world_size)
    per_backward = max(recipe.batch_size // (world_size * backwards), 1)
    decided = {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.local_batch(world_size),
        "gradient_accumulation_steps": recipe.engine.accumulate,
        "gradient_clipping": recipe.optimizer.clip_norm or 0.0,
    }
    for name, value in decided.items():
        given = config.get(name, "auto")
        if given not in ("auto", value):
            raise InputError(
                f"the DeepSpeed file {path} sets {name} to {given}, but the recipe makes it "
                f'{value}; write "auto" there, or change the recipe'
            )
    return (
        {"timers": _NO_TIMERS}
        | config
        | {
            # with gradient caching DeepSpeed sees one backward per chunk, so its own arithmetic of
            # batch = micro-batch x accumulation x processes is told in chunks
            "train_batch_size": per_backward * backwards * world_size,
            "train_micro_batch_size_per_gpu": per_backward,
            "gradient_accumulation_steps": backwards,
            # gradients that are whole are clipped here: at stage 0 DeepSpeed's own clipping waits
            # for the device, and of virtual processes its norm depends on their number
            "gradient_clipping": 0.0 if is_virtual or not stage else decided["gradient_clipping"],
            # with offloading too the optimizer is the recipe's: DeepSpeed's own has other moments
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**62,
        }
    )


def _check_whole(config: dict[str, Any], path: Path, stage: int) -> None:
    """Refuse what does not take gradients that are whole, as those of virtual processes are.

    Raises:
        InputError: naming what the file says and what to do.
    """
    zero = config["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    if stage == 3:
        reason = "is of stage 3, where no process holds whole weights"
    elif zero.get("cpu_offload") or offload.get("device", "none") != "none":
        reason = "offloads the optimizer, which takes them from backward passes alone"
    else:
        return
    raise InputError(
        f"engine.virtual_processes hands whole gradients in, but {path} {reason}; give another "
        "file, as of stage 0 to 2, or leave one of them out"
    )


def _check_names(config: dict[str, Any], path: Path) -> int:
    """Refuse what DeepSpeed would pass over or end on; the ZeRO stage of the file.

    Raises:
        InputError: if a name is none of those a file may have, or a value of ZeRO cannot be.
    """
    for name in config.keys() - {*_KNOWN, *_WITHOUT_EFFECT}:
        near = difflib.get_close_matches(name, _KNOWN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it from the file"
        raise InputError(
            f"the DeepSpeed file {path} has {name!r}, which is no setting of memory or "
            f"communication that DeepSpeed has; {hint}"
        )
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InputError(
            f"the DeepSpeed file {path} sets zero_optimization to {json.dumps(zero)}; write "
            '{"stage": 1}, or another stage from 0 to 3'
        )
    try:
        return int(DeepSpeedZeroConfig(**zero).stage)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("zero_optimization", *map(str, first["loc"])))
        raise InputError(
            f"the DeepSpeed file {path} sets {place} to {json.dumps(first['input'], default=str)}, "
            f"which DeepSpeed refuses: {first['msg']}; correct it"
        ) from None


def backwards_per_step(recipe: Recipe, world_size: int) -> int:
    """Backward passes of one process in one optimizer step."""
    if recipe.engine.cache_chunk is None:
        return recipe.engine.accumulate
    chunks = -(-recipe.local_batch(world_size) // recipe.engine.cache_chunk)
    return recipe.engine.accumulate * chunks

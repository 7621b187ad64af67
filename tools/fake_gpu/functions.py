"""Torch's functions as a user calls them, above autograd: where a device is named, it is found.

A CUDA device becomes "meta", by which `operators.run` knows it. What torch decides before any
operator runs (data from Python lists, pinning, the kernel of attention) is decided here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tools.fake_gpu import rules
from tools.fake_gpu.process import GPU
from tools.fake_gpu.tensor import GpuTensor

META = torch.device("meta")
MATH, FLASH = 0, 1  # `torch._fused_sdp_choice`
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}
UNCHANGED = {torch.device, torch._C._nn._parse_to}


class Functions(TorchFunctionMode):
    """Entered once, for the life of the process."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in UNCHANGED:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:  # what it repeats must come through here too
            with self:
                return _backward(*args, **kwargs)
        if func in REPLACED:
            return REPLACED[func](*args, **kwargs)
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        if func is torch.Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], torch.device("cuda", args[1]), *args[2:])
        if func in FROM_DATA:
            return _from_data(func, args, kwargs)
        named = [x for x in (*args, *kwargs.values()) if _is_device(x)]
        if any(is_cuda(x) for x in named):
            args, kwargs = pytree.tree_map(_as_meta, (args, kwargs))
        elif any(torch.device(x) == META for x in named):
            with GPU.meaning_meta():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_device(x: object) -> bool:
    return isinstance(x, torch.device) or (
        isinstance(x, str) and x.partition(":")[0] in ("cuda", "meta")
    )


def is_cuda(x: object) -> bool:
    return _is_device(x) and torch.device(x).type == "cuda"


def _as_meta(x: object) -> object:
    """A CUDA device as "meta".

    Raises:
        RuntimeError: it is not the rank's own: memory of another rank's GPU.
    """
    if not is_cuda(x):
        return x
    index = torch.device(x).index
    if index not in (None, GPU.index):
        raise RuntimeError(f"cuda:{index} is named, but this rank's device is {GPU.device}")
    return META


def _from_data(func, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """`torch.tensor` and its like: made on the CPU, then copied, for which the host waits."""
    device = kwargs.pop("device", None)
    if len(args) > 2 and func is torch.as_tensor:
        args, device = args[:2], args[2]
    source = args[0] if args else kwargs.pop("data")
    if isinstance(source, GpuTensor):
        copied = source.detach().clone() if func is torch.tensor else source
        dtype = kwargs.get("dtype") or (args[1] if len(args) > 1 else copied.dtype)
        return copied.to(device or GPU.device, dtype)
    if isinstance(source, (list, tuple)):
        source = pytree.tree_map_only(GpuTensor, lambda t: t.item(), source)
    made = func(source, *args[1:], **kwargs)
    if device is None or not is_cuda(device):
        return made if device is None else made.to(device)
    _as_meta(device)
    GPU.wait(func.__name__)
    GPU.launch("_to_copy")
    return GpuTensor(made.detach().clone()).requires_grad_(made.requires_grad)


def _new_tensor(like: torch.Tensor, data: Any, **kwargs: Any) -> torch.Tensor:
    kwargs = {"dtype": like.dtype, "device": like.device} | kwargs
    return _from_data(torch.tensor, (data,), kwargs)


def _backward(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _cuda(tensor: torch.Tensor, device=None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
    if isinstance(tensor, GpuTensor):
        return tensor
    return tensor.to(META, non_blocking=non_blocking)


def _pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    if isinstance(tensor, GpuTensor):
        return tensor.pin_memory()
    pinned = tensor.clone()
    GPU.pin(pinned)
    return pinned


def _is_pinned(tensor: torch.Tensor, *_: Any) -> bool:
    return not isinstance(tensor, GpuTensor) and GPU.has_pinned(tensor)


def _resize(tensor: torch.Tensor, *size: Any, **_: Any) -> torch.Tensor:
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    if isinstance(tensor, GpuTensor):
        tensor.data = GpuTensor(tensor.host.resize_(shape))
        return tensor
    return tensor.resize_(shape)


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`. On CUDA a tensor of the CPU may take data on the GPU, and stays the
    object that it was, with its attributes; so it does here."""
    if isinstance(tensor, GpuTensor) or not isinstance(value, GpuTensor):
        torch.Tensor.data.__set__(tensor, value)
        return
    new: torch.Tensor = GpuTensor(value.host)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    vars(new).update(vars(tensor))
    torch.utils.swap_tensors(tensor, new)


def _may_share_data(one: torch.Tensor, other: torch.Tensor) -> bool:
    return isinstance(one, GpuTensor) == isinstance(other, GpuTensor)


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """`scaled_dot_product_attention` of GPU tensors by the kernel that torch takes on the CPU: one
    fused one, or its steps one by one.

    Raises:
        RuntimeError: tensors on two devices.
    """
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    there, here = rules.gpu_and_cpu(tensors)
    names = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if not there:
        return SDPA(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **names)
    if here:
        rules.refuse(SDPA, there, here)
    hosts = [t.host.detach() for t in (query, key, value)]
    mask = attn_mask.host.detach() if attn_mask is not None else None
    aten = torch.ops.aten
    if torch._fused_sdp_choice(*hosts, attn_mask=mask, enable_gqa=enable_gqa, **names) != FLASH:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **names
        )[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


SDPA = torch.nn.functional.scaled_dot_product_attention
REPLACED: dict[Any, Any] = {
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.data.__set__: _set_data,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.is_pinned: _is_pinned,
    torch.Tensor.resize_: _resize,
    torch._has_compatible_shallow_copy_type: _may_share_data,
    SDPA: attention,
}

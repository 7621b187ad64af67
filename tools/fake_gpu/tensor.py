"""The tensor of a fake GPU.

Inside torch's C++ it is on "meta", where nothing is computed; `host` is the CPU tensor with its
numbers. Views are made of both, so memory is shared as on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from tools.fake_gpu.process import GPU


class GpuTensor(torch.Tensor):
    """A tensor that says it is on "cuda". `host` holds its numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device="meta",
        )
        made.host = host
        return made

    # Functions arrive below autograd only, in `operators.run`.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from tools.fake_gpu.operators import run

        return run(func, args, kwargs or {})

    # ---- where it is

    @property
    def device(self) -> torch.device:
        return GPU.device

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return GPU.index

    def type(self, *args: Any, **kwargs: Any):
        if args or kwargs:
            return torch.Tensor.type(self, *args, **kwargs)
        return "torch.cuda." + self.host.type().rpartition(".")[2]

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to("cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def is_pinned(self, *args: Any) -> bool:
        return False

    def pin_memory(self, *args: Any):
        raise RuntimeError(f"cannot pin {self.type()!r}: only dense CPU tensors can be pinned")

    def record_stream(self, stream: object) -> None:
        """Streams are in order here."""

    # ---- its memory

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, GpuTensor):
            raise RuntimeError(
                "incompatible tensor type: the data of a tensor on cuda set to one on the CPU"
            )
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def storage(self):
        return self.host.storage()

    # ---- what the host may read

    def tolist(self):
        GPU.wait("tolist")
        return self.host.tolist()

    def numpy(self, *args: Any, **kwargs: Any):
        raise TypeError(
            f"can't convert {GPU.device} device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def __array__(self, *args: Any, **kwargs: Any):
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        GPU.wait("repr")
        return f"GpuTensor({self.host!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    # ---- copies

    def __reduce_ex__(self, protocol):
        GPU.wait("pickle")
        return on_gpu, (self.host.detach(), self.requires_grad)

    def __deepcopy__(self, memo):
        copy = GpuTensor(self.host.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        else:
            copy.requires_grad_(self.requires_grad)
        copy.__dict__.update({name: value for name, value in vars(self).items() if name != "host"})
        memo[id(self)] = copy
        return copy


def on_gpu(host: torch.Tensor, requires_grad: bool = False) -> GpuTensor:
    return GpuTensor(host).requires_grad_(requires_grad)
